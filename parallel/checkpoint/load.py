"""Loading into whatever layout runs now: each rank reads the bytes of its own parts, in place.

Nothing is read before every file has the size and hash that the manifest says, and no tensor is touched before
every name, shape and dtype fits: a checkpoint of another model is refused with all differences at once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from meshwright.parallel.checkpoint.agree import CheckpointError, ranks_of
from meshwright.parallel.checkpoint.describe import HeldPart
from meshwright.parallel.checkpoint.folder import STATE_NAME, Manifest, read_manifest, read_sealed
from meshwright.parallel.checkpoint.plan import PartLoadPlanner
from meshwright.parallel.checkpoint.storage import TABLE_NAME, FolderReader, table_from_json
from meshwright.parallel.checkpoint.verify import verified
from meshwright.parallel.mesh import Mesh

_SHOWN = 20


@dataclass(frozen=True)
class Expect:
    """What a checkpoint must be, beyond having the wanted tensors in the right shapes."""

    fingerprint: str | None = None
    """The model's; None accepts any."""
    may_stay_unread: tuple[str, ...] = ()
    """Beginnings of names that the checkpoint may have and nobody wants, such as "optimizer."; ("",) = any."""
    same_dtype: bool = True
    """Whether a tensor saved in another dtype is an error; if not, its elements are converted."""
    is_verified: bool = False
    """Whether the files were verified just now (`newest_that_verifies`), so that they need not be read twice."""


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint, whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def load_checkpoint(
    path: Path, tensors: Mapping[str, HeldPart | Tensor], mesh: Mesh, expect: Expect | None = None
) -> dict[str, Any]:
    """Fill `tensors` in place from a checkpoint and return its state; every rank must call this.

    A plain tensor receives the whole global tensor. The layout may be another than the one that saved.

    Raises:
        CheckpointError: on every rank, if the checkpoint is damaged or does not fit; then nothing was changed.
    """
    expect = expect or Expect()
    ranks = ranks_of(mesh)
    if not expect.is_verified and (damage := verified(path, ranks)):
        raise CheckpointError(f"{path} is damaged: " + "; ".join(damage))
    try:
        manifest, table, state = ranks.first(partial(_read_small, path))
        metadata = table_from_json(table)
        problems = ranks.together(
            lambda: _first_problems(tensors, metadata, expect),
            lambda found: _fingerprint_problems(manifest, expect) + _all_problems(found, metadata, expect),
        )
        if problems:
            raise CheckpointError(_listed(problems))
        ranks.together(lambda: _read(path, tensors, metadata), lambda _: None)
    except CheckpointError as error:
        raise CheckpointError(f"{path} was not loaded: {error}") from None
    loaded: dict[str, Any] = json.loads(state)
    return loaded


def read_state(path: Path, mesh: Mesh) -> dict[str, Any]:
    """Return a checkpoint's state alone, checked against the manifest; every rank must call this.

    Raises:
        CheckpointError: on every rank, if the manifest or the state is missing or damaged.
    """
    state: dict[str, Any] = json.loads(ranks_of(mesh).first(partial(_read_small, path))[2])
    return state


def saved_tensors(path: Path) -> dict[str, SavedTensor]:
    """Return what a checkpoint holds, by global name, for one process that wants to look.

    Raises:
        ValueError: if the manifest or the table is missing or damaged.
    """
    table = read_sealed(path, TABLE_NAME, read_manifest(path))
    return {
        name: SavedTensor(entry.properties.dtype, tuple(entry.size))
        for name, entry in _entries(table_from_json(table)).items()
    }


@dataclass(frozen=True)
class _RankProblems:
    """What one rank asked for, and what of it does not fit."""

    names: frozenset[str]
    problems: list[str]


def _read_small(path: Path) -> tuple[Manifest, bytes, bytes]:
    manifest = read_manifest(path)
    return manifest, read_sealed(path, TABLE_NAME, manifest), read_sealed(path, STATE_NAME, manifest)


def _read(path: Path, tensors: Mapping[str, HeldPart | Tensor], metadata: Metadata) -> None:
    planner = PartLoadPlanner({name: _target(tensor) for name, tensor in tensors.items()}, metadata)
    plan = planner.create_local_plan()
    reader = FolderReader(path)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    with torch.no_grad():
        reader.read_data(plan, planner).wait()


def _target(tensor: HeldPart | Tensor) -> HeldPart:
    if isinstance(tensor, HeldPart):
        return tensor
    return HeldPart(tensor, tuple(tensor.shape), (0,) * tensor.dim())


def _first_problems(tensors: Mapping[str, HeldPart | Tensor], metadata: Metadata, expect: Expect) -> _RankProblems:
    """Return what does not fit this rank's tensors."""
    entries = _entries(metadata)
    problems = []
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            problems.append(f"{name} is a DTensor, which does not know its whole shape: pass describe(...)")
            continue
        part = _target(tensor)
        entry = entries.get(name)
        if entry is None:
            problems.append(f"{name} {list(part.global_shape)} is not in the checkpoint")
        elif tuple(entry.size) != part.global_shape:
            problems.append(f"{name} is {list(entry.size)} in the checkpoint, {list(part.global_shape)} here")
        elif expect.same_dtype and entry.properties.dtype != part.tensor.dtype:
            problems.append(f"{name} is {entry.properties.dtype} in the checkpoint, {part.tensor.dtype} here")
    return _RankProblems(frozenset(tensors), problems)


def _all_problems(found: list[_RankProblems], metadata: Metadata, expect: Expect) -> list[str]:
    """Return every rank's problems once, and what the checkpoint holds that no rank asked for."""
    problems = dict.fromkeys(problem for of_rank in found for problem in of_rank.problems)
    wanted = frozenset().union(*(of_rank.names for of_rank in found))
    for name, entry in _entries(metadata).items():
        if name not in wanted and not name.startswith(expect.may_stay_unread):
            problems[f"{name} {list(entry.size)} is in the checkpoint, and nothing here asks for it"] = None
    return list(problems)


def _fingerprint_problems(manifest: Manifest, expect: Expect) -> list[str]:
    if expect.fingerprint is None or manifest.fingerprint == expect.fingerprint:
        return []
    return [f"its fingerprint is {manifest.fingerprint}, this model's is {expect.fingerprint}"]


def _listed(problems: list[str]) -> str:
    shown = [*problems[:_SHOWN], *([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])]
    return "it is a checkpoint of another model" + "".join(f"\n  {problem}" for problem in shown)


def _entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    entries = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        entries[name] = entry
    return entries
