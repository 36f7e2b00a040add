"""What a family of foreign models is: its names, shapes and configuration, to and from ours.

A family is one `model_type` of Hugging Face's `transformers`. Its tables are data and small functions on numbers; who
writes or reads the tensors walks over the rows (launcher/weights/rows.py):

    theirs                                           ours
    model.layers.0.self_attn.q_proj.weight [n*d, h]  layers.0.mixer.part.q.weight                the same
    ...mlp.experts.2.gate_proj.weight [f, h]         ...part.experts.gate [e, f, h], at 2        a slice
    h.0.attn.c_attn.weight [h, 3h]                   ...q, k, v .weight [h, h]                   joined, transposed
    h.0...query_key_value.weight [3h, h]             ...q, k, v                                  joined in n groups
    ...kv_a_proj_with_mqa.weight [c + r, h]          ...kv_a, k_rope                             joined, r in pairs

Where several of ours are joined, each is cut into `groups` equal runs of rows, and theirs is the first run of each,
then the second of each, and so on:

    groups = 1   q q q q k k v v        groups = 2   q q k v | q q k v

Rotary features are half-split with us, (0, r/2) (1, r/2 + 1) ...; a row with `pairs` has them side by side on the disk.
Names on the disk are meant, which stay the same between versions of the foreign library; in memory it may stack experts
of its own accord.

This file knows no family; nothing here needs torch.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from meshwright.model.config import ModelConfig

BUFFERS = "buffers."
"""Begins the name of what is kept with the weights and is no parameter, as in a checkpoint."""


class Source(NamedTuple):
    """One of our tensors, or a slice of it, that a foreign one is made of."""

    ours: str
    shape: tuple[int, ...]
    """Of our tensor; of the slice where there is an `at`."""
    at: int | None = None
    """The slice along dim 0; None for all of it."""

    @property
    def rows(self) -> int:
        """Return how many rows it has as a matrix, or numbers as a vector."""
        return prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]


class Row(NamedTuple):
    """One tensor of a foreign file, and where its values stand with us."""

    theirs: str
    shape: tuple[int, ...]
    """The foreign tensor's."""
    sources: tuple[Source, ...]
    groups: int = 1
    """Into how many runs each source is cut, one of each beside the other."""
    pairs: int = 0
    """So many rows at each group's end are the two of a rotary pair side by side."""
    is_transposed: bool = False
    """Whether theirs is [in, out]."""

    @property
    def is_plain(self) -> bool:
        """Say whether the values are one source's, in the same order."""
        return len(self.sources) == 1 and not self.pairs and not self.is_transposed

    @property
    def tail(self) -> tuple[int, ...]:
        """Return the last dim of matrices, which is never joined; nothing for vectors."""
        return self.sources[0].shape[1:][-1:]

    @property
    def group_rows(self) -> int:
        """Return how many rows one group has."""
        return sum(source.rows for source in self.sources) // self.groups


class Span(NamedTuple):
    """Which part of a foreign tensor holds some of our rows."""

    first: int
    end: int
    """Along the dim that the rows lie in: dim 0, or the last one where theirs is transposed."""
    skipped: int
    """Rows at its beginning that belong to nothing wanted."""
    rows: int
    """Rows wanted from there: those of whole groups, or the wanted ones alone."""
    is_exact: bool
    """Whether these are the wanted ones alone."""


def same(ours: str, theirs: str, shape: tuple[int, ...], at: int | None = None) -> Row:
    """Return the row of a tensor that both have in one shape, or that is a slice of ours."""
    return Row(theirs, shape, (Source(ours, shape, at),))


def span_of(row: Row, number: int, first: int, end: int) -> Span:
    """Return where rows `first` to before `end` (along dim 0 of our source `number`) lie in the foreign tensor."""
    source = row.sources[number]
    each = source.rows // source.shape[0]
    lowest, highest = first * each, end * each
    if row.groups == 1 and not row.pairs:
        before = sum(other.rows for other in row.sources[:number])
        begin, stop, is_exact = before + lowest, before + highest, True
    else:
        run = source.rows // row.groups
        begin, stop, is_exact = lowest // run * row.group_rows, -(-highest // run) * row.group_rows, False
    dim = row.shape[-1] if row.is_transposed else row.shape[0]
    per = row.groups * row.group_rows // dim
    return Span(begin // per, -(-stop // per), begin % per, stop - begin, is_exact)


@dataclass(frozen=True)
class Family:
    """One foreign class of models; `choose_family` picks the one that a configuration belongs to."""

    model_type: str
    class_name: str
    reasons_against: Callable[[ModelConfig], list[str]]
    """Every reason why this class cannot represent the configuration exactly, each with a way out."""
    mapping: Callable[[ModelConfig], Iterator[Row]]
    """All tensors, in the order in which they are written."""
    to_foreign: Callable[[ModelConfig], dict[str, Any]]
    """The configuration as the foreign library writes it, in its new and its old spelling, without `fixed`."""
    to_ours: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Keys of our [model] table from a foreign configuration; raises ValueError with all that we lack."""
    needed: tuple[str, ...]
    """The foreign keys that must be there; for any other one that is missing the class has a default."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Foreign keys that ask for what is not computed here, unless they hold one of these; the first is written."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names by which the class takes a key from a file, each with the one that is read here."""
    not_null: tuple[str, ...] = ()
    """Foreign keys that may be left out and, unlike in other classes, not be null."""
    loaded_with: Mapping[str, Any] = field(default_factory=dict)
    """What the class is told in place of a file's keys when it is loaded, so that it holds the file's weights."""
    prefix: str = ""
    """Beginning of the names that old files of the class leave out."""
    ignored: str = ""
    """A regular expression of names that may be in files and have no part in the model: masks, tables of positions."""
    further: str = ""
    """One of names that only layers behind the last have, which predict further tokens: `layer`, with its `number`."""

    def passed_over(self, names: Collection[str], num_layers: int) -> set[str]:
        """Return the names of files that have no part in a model of so many layers.

        A plain layer behind the last is none of them: it is one that config.json has lost.
        """
        marked = (re.search(self.further, name) for name in names if self.further)
        layers = tuple(mark["layer"] for mark in marked if mark and int(mark["number"]) >= num_layers)
        return {
            name
            for name in names
            if (self.ignored and re.search(self.ignored, name)) or (layers and name.startswith(layers))
        }


def our_shapes(rows: Iterable[Row]) -> dict[str, tuple[int, ...]]:
    """Return the global shape of each of our tensors that the rows fill; stacked ones have all their slices.

    Raises:
        ValueError: if two rows fill the same values, or the slices of a tensor are not 0, 1, 2, ...
    """
    slices: dict[str, list[Source]] = {}
    for row in rows:
        for source in row.sources:
            slices.setdefault(source.ours, []).append(source)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parts in slices.items():
        if len(parts) == 1 and parts[0].at is None:
            shapes[name] = parts[0].shape
        elif sorted(-1 if part.at is None else part.at for part in parts) == list(range(len(parts))):
            shapes[name] = (len(parts), *parts[0].shape)
        else:
            raise ValueError(f"{name} is filled twice or with gaps: {[part.at for part in parts]}")
    return shapes
