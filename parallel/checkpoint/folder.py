"""The directory protocol: a checkpoint is whole, or it is not there.

    checkpoints/
        step_00000100/                  a finished checkpoint
            rank_00000.bin ...          the bytes            tensors.json   which tensor lies where
            state.json                  small values         manifest.json  every file's size and hash
        step_00000200.tmp-1f3a9c07/     being written, or left behind by a kill; the next save removes it
        step_00000100.old-77d02b1e/     being replaced by a new save of the same step

    write aside -> fsync each file -> manifest, fsync -> fsync the folder -> rename -> fsync the parent

A kill before the rename leaves a `.tmp-`, after it a checkpoint. Where the step exists already (training went
back and came by again), the old one is moved to `.old-` and removed after the rename; a kill between the two
leaves the step as `.old-` alone, and it gets its name back when the next run looks for checkpoints.
Only rank 0 makes, renames and removes; only names of these forms are ever touched. When to save is not known here.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.parallel.checkpoint.durable import (
    HASH_NAME,
    FileSeal,
    as_json_bytes,
    hash_bytes,
    new_token,
    sync_folder,
    write_file,
)

MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
FORMAT = "meshwright checkpoint"
VERSION = 1
_FINISHED = re.compile(r"step_(\d{8,})")
_ASIDE = re.compile(r"step_(\d{8,})\.(tmp|old)-[0-9a-f]{8}")

# Folders that this process is writing now: another save that begins meanwhile must not take them for leftovers.
_UNDER_WAY: set[Path] = set()


@dataclass(frozen=True)
class Keep:
    """Which finished checkpoints stay when a newer one is written."""

    last: int = 2
    every: int = 0
    """Steps that this divides stay for good; 0 = none."""
    passed_over: frozenset[int] = frozenset()
    """Steps whose checkpoints are known to be damaged: they do not count as newest, and are not removed."""


@dataclass(frozen=True)
class Manifest:
    """What a finished checkpoint says about itself."""

    step: int
    world_size: int
    fingerprint: str
    """The caller's word for the model; a checkpoint of another model is refused."""
    files: dict[str, FileSeal]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step that a folder's name says; None if it is no name of a finished checkpoint."""
    match = _FINISHED.fullmatch(path.name)
    return int(match[1]) if match and path.name == checkpoint_path(path.parent, int(match[1])).name else None


def list_checkpoints(folder: Path) -> list[int]:
    """Return the steps of all finished checkpoints, oldest first, without looking into them."""
    if not folder.is_dir():
        return []
    steps = [step_of(path) for path in folder.iterdir() if path.is_dir()]
    return sorted(step for step in steps if step is not None)


def begin(folder: Path, step: int) -> Path:
    """Remove what killed saves left, and make the folder that the checkpoint of `step` is written into.

    What cannot be removed is left to the next save: it is in nobody's way.

    Raises:
        FileExistsError: if something that is no folder has the checkpoint's name.
    """
    finished = checkpoint_path(folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    if finished.exists() and not finished.is_dir():
        raise FileExistsError(f"{finished} is in the way: it is no folder; move it away")
    for path in list(folder.iterdir()):
        if _ASIDE.fullmatch(path.name) and path.is_dir() and path not in _UNDER_WAY:
            _remove(path)
    aside = _aside(checkpoint_path(folder, step), "tmp")
    aside.mkdir()
    _UNDER_WAY.add(aside)
    return aside


def recover(folder: Path) -> None:
    """Give a checkpoint its name back if a kill left it between the two renames of `commit`."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = _ASIDE.fullmatch(path.name)
        if match and match[2] == "old" and not (finished := checkpoint_path(folder, int(match[1]))).exists():
            os.rename(path, finished)
            sync_folder(folder)


def commit(aside: Path, manifest: Manifest) -> Path:
    """Seal the folder with its manifest and give it its name; then it is a checkpoint."""
    write_file(aside / MANIFEST_NAME, _manifest_bytes(manifest))
    sync_folder(aside)
    finished = checkpoint_path(aside.parent, manifest.step)
    replaced = _aside(finished, "old") if finished.exists() else None
    if replaced:
        os.rename(finished, replaced)
    os.rename(aside, finished)
    sync_folder(finished.parent)
    _UNDER_WAY.discard(aside)
    if replaced:
        _remove(replaced)
    return finished


def discard(aside: Path) -> None:
    """Remove the folder of a save that failed; what cannot be removed is left to the next save."""
    _UNDER_WAY.discard(aside)
    _remove(aside)
    recover(aside.parent)


def retain(folder: Path, step: int, keep: Keep) -> list[str]:
    """Remove the checkpoints before `step`, the one just written, that need not stay; return what could not be.

    Later ones are not touched: after going back to an older checkpoint they are the future that was left, perhaps
    damaged, and counting them as newest would remove what is good.

    Raises:
        ValueError: if fewer than one would be kept.
    """
    if keep.last < 1 or keep.every < 0:
        raise ValueError(f"keep at least the last 1 checkpoint, and every = 0 or more: got {keep}")
    past = [other for other in list_checkpoints(folder) if other <= step and other not in keep.passed_over]
    stay = set(past[-keep.last :]) | {other for other in past if keep.every and other % keep.every == 0}
    problems = []
    for other in past:
        if other in stay:
            continue
        # Renamed first: a kill while removing must not leave half a checkpoint under a whole one's name.
        path = checkpoint_path(folder, other)
        aside = _aside(path, "tmp")
        try:
            os.rename(path, aside)
        except OSError as error:
            problems.append(f"{path} could not be removed: {error.strerror}")
            continue
        if not _remove(aside):
            problems.append(f"{path} could not be removed, and what is left of it is {aside}")
    return problems


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of a checkpoint.

    Raises:
        ValueError: if it is missing, changed, of another format or of another step than the folder's name says.
    """
    file = path / MANIFEST_NAME
    if not path.is_dir():
        raise ValueError(f"{path} is no folder")
    if not file.is_file():
        raise ValueError(f"{file} is missing: this is no finished checkpoint")
    try:
        whole = json.loads(file.read_bytes())
        body = whole["manifest"]
        if whole[HASH_NAME] != hash_bytes(as_json_bytes(body)).xxh3_128:
            raise ValueError(f"{file} was changed: its own hash does not match")
        if body["format"] != FORMAT or body["version"] != VERSION:
            raise ValueError(f"{file} is of format {body['format']!r} {body['version']}, not {FORMAT!r} {VERSION}")
        files = {name: FileSeal(**seal) for name, seal in body["files"].items()}
        manifest = Manifest(body["step"], body["world_size"], body["fingerprint"], files)
    except KeyError as error:
        raise ValueError(f"{file} is damaged: it has no entry {error}") from None
    except (TypeError, AttributeError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if step_of(path) not in (None, manifest.step):
        raise ValueError(f"{file} is of step {manifest.step}, the folder's name says another")
    return manifest


def read_sealed(path: Path, name: str, manifest: Manifest) -> bytes:
    """Read a small file of a checkpoint whole, and check it against the manifest.

    Raises:
        ValueError: if it is missing or changed.
    """
    if name not in manifest.files:
        raise ValueError(f"{path / MANIFEST_NAME} lists no {name}")
    data = (path / name).read_bytes()
    if hash_bytes(data) != manifest.files[name]:
        raise ValueError(f"{path / name} was changed: size or hash is not the manifest's")
    return data


def size_problems(path: Path, manifest: Manifest) -> list[str]:
    """Return which files are missing, of another length, or strangers that look like ours."""
    problems = []
    for name, seal in manifest.files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif (size := file.stat().st_size) != seal.bytes:
            problems.append(f"{file} has {size} bytes, {seal.bytes} were written")
    strangers = sorted(file.name for file in path.glob("*.bin") if file.name not in manifest.files)
    return problems + [f"{path / name} is not of this checkpoint" for name in strangers]


def json_state(state: dict[str, Any]) -> bytes:
    """Return the caller's small values as JSON.

    Raises:
        ValueError: if a value would come back as something else (a tuple, a key that is no string, an object).
    """
    _refuse_what_json_changes(state, "state")
    return as_json_bytes(state)


def _refuse_what_json_changes(value: Any, where: str) -> None:
    if type(value) is dict:
        for key, inner in value.items():
            if type(key) is not str:
                raise ValueError(f"{where} has the key {key!r}: keys must be strings")
            _refuse_what_json_changes(inner, f"{where}[{key!r}]")
    elif type(value) is list:
        for at, inner in enumerate(value):
            _refuse_what_json_changes(inner, f"{where}[{at}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise ValueError(
            f"{where} is a {type(value).__name__}: a checkpoint's state holds None, bool, int, float, str, list and "
            "dict; tensors go beside it"
        )


def _remove(path: Path) -> bool:
    """Remove a folder, or a link to one, as far as that is possible; say whether it is gone."""
    if path.is_symlink():
        path.unlink(missing_ok=True)  # what it points to lies elsewhere and is not ours
    else:
        shutil.rmtree(path, ignore_errors=True)
    return not os.path.lexists(path)


def _aside(finished: Path, why: str) -> Path:
    return finished.with_name(f"{finished.name}.{why}-{new_token()}")


def _manifest_bytes(manifest: Manifest) -> bytes:
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "fingerprint": manifest.fingerprint,
        "files": {name: seal.as_json() for name, seal in manifest.files.items()},
    }
    return as_json_bytes({"manifest": body, HASH_NAME: hash_bytes(as_json_bytes(body)).xxh3_128})
