"""What a family of foreign models is: its names, shapes and configuration, to and from ours.

A family is one `model_type` of Hugging Face's `transformers`. Its tables are data and small functions on
numbers; who writes or reads the tensors walks over the rows:

    ours                                      at    theirs                                    shape
    layers.0.mixer.part.q.weight              None   model.layers.0.self_attn.q_proj.weight    [n*d, h]
    layers.0.feedforward.part.experts.gate    2      model.layers.0.mlp.experts.2.gate_proj    [f, h]

A row with an `at` is one slice of our tensor along dim 0: experts are stacked with us and apart on
their disk. Names on the disk are meant, which stay the same between versions of the foreign library;
in memory it may stack experts of its own accord.

This file knows no family; nothing here needs torch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from meshwright.model.config import ModelConfig


class Row(NamedTuple):
    """One tensor of a foreign file and where its values stand with us."""

    ours: str
    at: int | None
    """The slice along dim 0 of our tensor; None for all of it."""
    theirs: str
    shape: tuple[int, ...]
    """The foreign tensor's shape, which is our slice's too."""


@dataclass(frozen=True)
class Family:
    """One foreign class of models; `choose_family` picks the one that a configuration belongs to."""

    model_type: str
    class_name: str
    reasons_against: Callable[[ModelConfig], list[str]]
    """Every reason why this class cannot represent the configuration exactly, each with a way out."""
    mapping: Callable[[ModelConfig], list[Row]]
    """All tensors, in the order in which they are written."""
    to_foreign: Callable[[ModelConfig], dict[str, Any]]
    """The configuration as the foreign library writes it, in its new and its old spelling."""
    to_ours: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Keys of our [model] table from a foreign configuration; raises ValueError with all that we lack."""
    needed: tuple[str, ...]
    """The foreign keys that must be there; for any other one that is missing the class has a default."""


def our_shapes(rows: Iterable[Row]) -> dict[str, tuple[int, ...]]:
    """Return the global shape of each of our tensors that the rows fill; stacked ones have all their slices.

    Raises:
        ValueError: if two rows fill the same values, or the slices of a tensor are not 0, 1, 2, ...
    """
    slices: dict[str, list[Row]] = {}
    for row in rows:
        slices.setdefault(row.ours, []).append(row)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parts in slices.items():
        if len(parts) == 1 and parts[0].at is None:
            shapes[name] = parts[0].shape
        elif sorted(-1 if part.at is None else part.at for part in parts) == list(range(len(parts))):
            shapes[name] = (len(parts), *parts[0].shape)
        else:
            raise ValueError(f"{name} is filled twice or with gaps: {[part.theirs for part in parts]}")
    return shapes


def inverse(rows: Iterable[Row]) -> dict[str, tuple[str, int | None]]:
    """Return, for each foreign name, our name and the slice along dim 0."""
    return {row.theirs: (row.ours, row.at) for row in rows}
