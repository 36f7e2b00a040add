"""Which checkpoints can be trusted: each file is read once, by one rank, and all ranks reach the same verdict."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from meshwright.parallel.checkpoint.agree import Ranks, ranks_of
from meshwright.parallel.checkpoint.durable import hash_file
from meshwright.parallel.checkpoint.folder import (
    Manifest,
    checkpoint_path,
    list_checkpoints,
    read_manifest,
    recover,
    size_problems,
)
from meshwright.parallel.mesh import Mesh


@dataclass(frozen=True)
class Newest:
    """The newest checkpoint that verifies, and why newer ones were passed over."""

    path: Path | None
    step: int
    """0 when there is none."""
    passed_over: dict[Path, list[str]]
    """Newer checkpoints, and what is wrong with each."""


def verify(path: Path, mesh: Mesh) -> list[str]:
    """Return everything that is wrong with a checkpoint; empty means that every byte is as it was written."""
    return verified(path, ranks_of(mesh))


def newest_that_verifies(folder: Path, mesh: Mesh) -> Newest:
    """Return the newest checkpoint of a folder that every rank may load; a damaged one is passed over with the reason.

    The verdict is the same on all ranks, and so is the choice.
    """
    ranks = ranks_of(mesh)
    passed_over: dict[Path, list[str]] = {}
    for step in ranks.first(lambda: _recovered_steps(folder)):
        path = checkpoint_path(folder, step)
        problems = verified(path, ranks)
        if not problems:
            return Newest(path, step, passed_over)
        passed_over[path] = problems
    return Newest(None, 0, passed_over)


def _recovered_steps(folder: Path) -> list[int]:
    recover(folder)
    return list_checkpoints(folder)[::-1]


def verified(path: Path, ranks: Ranks) -> list[str]:
    """Do what `verify` says over these ranks."""
    manifest, problems = ranks.first(lambda: _first_look(path))
    if manifest is None or problems:
        return problems
    mine = _share(manifest, ranks.rank, ranks.size)
    return ranks.together(lambda: _hash_problems(path, manifest, mine), lambda found: list(chain(*found)))


def _first_look(path: Path) -> tuple[Manifest | None, list[str]]:
    try:
        manifest = read_manifest(path)
        return manifest, size_problems(path, manifest)
    except (ValueError, OSError) as error:
        return None, [str(error)]


def _share(manifest: Manifest, rank: int, num_ranks: int) -> list[str]:
    """Return the files that this rank reads: the largest first, each to the rank with the least to read so far."""
    load = [0] * num_ranks
    mine = []
    for name, seal in sorted(manifest.files.items(), key=lambda file: (-file[1].bytes, file[0])):
        reader = load.index(min(load))
        load[reader] += seal.bytes
        if reader == rank:
            mine.append(name)
    return mine


def _hash_problems(path: Path, manifest: Manifest, names: list[str]) -> list[str]:
    problems = []
    for name in names:
        try:
            if hash_file(path / name) != manifest.files[name]:
                problems.append(f"{path / name} was changed: its hash is not the manifest's")
        except OSError as error:
            problems.append(f"{path / name} cannot be read: {error}")
    return problems
