"""The files of an exported folder: which tensor lies in which, and what their JSON says.

    model.safetensors                                  of a small model, all of them
    model-00001-of-00002.safetensors ...               of a larger one, and model.safetensors.index.json, which says
                                                       in its weight_map where each tensor lies
    config.json                                        the model

Everything here came from another hand: each thing that does not hold is told by name. This file knows no names of ours.
"""

import json
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from meshwright.launcher.runfile.input_file import MOST_NESTED, input_bytes, nesting
from meshwright.launcher.runfile.messages import ConfigError, shown
from meshwright.launcher.weights.safetensors_stream import INDEX_NAME, SINGLE_NAME

# The index of a model of a million tensors has some 100 MB; nothing else in JSON comes near.
MOST_JSON_BYTES = 2**28
# So many lines are printed.
MOST_TOLD = 40
# Two tensors are held against each other so many bytes at a time.
COMPARED_BYTES = 2**26
# A file's name may have so many bytes on Linux (NAME_MAX).
MOST_NAME_BYTES = 255


def files_of(folder: Path) -> dict[str, Path]:
    """Return in which file each foreign tensor lies.

    Raises:
        ConfigError: if files are missing or no safetensors files, hold anything else than the index says, or there
            are two sets of them.
    """
    index = folder / INDEX_NAME
    if index.is_dir():
        raise ConfigError(str(index), ["is a folder; an index in JSON, or none beside model.safetensors, would fit"])
    if not index.is_file():
        held = _tensors_in(folder, [SINGLE_NAME])
        return {tensor: folder / file for file, tensors in held.items() for tensor in tensors}
    weight_map = _weight_map(index)
    if (folder / SINGLE_NAME).exists() and set(weight_map.values()) != {SINGLE_NAME}:
        # Of a model that was saved anew into its old folder; transformers reads the single file.
        what = f"{SINGLE_NAME} is there, and {INDEX_NAME} names other files: must be one set of weights"
        raise ConfigError(str(folder), [f"{what}; a folder without the one of the two that is out of date would fit"])
    held = _tensors_in(folder, sorted(set(weight_map.values())))
    if problems := list(_broken_promises(weight_map, held)):
        raise ConfigError(str(index), first_told(problems))
    return {tensor: folder / file for tensor, file in weight_map.items()}


def _tensors_in(folder: Path, names: list[str]) -> dict[str, frozenset[str]]:
    """Return the names of the tensors in each file."""
    held, problems = dict[str, frozenset[str]](), dict[str, str]()
    for name in names:
        path = folder / name
        if path.is_dir():
            problems[name] = "is a folder; a safetensors file of this name would fit"
            continue
        if not path.is_file():
            pickled = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
            way_out = (
                f"; {pickled[0]} cannot be read, save_pretrained of transformers writes safetensors" if pickled else ""
            )
            problems[name] = f"is missing{way_out}"
            continue
        try:
            with safe_open(path, framework="pt") as file:
                held[name] = frozenset(file.keys())
        except SafetensorError as error:
            problems[name] = f"is damaged: {error}"
    if len(problems) == 1:
        ((name, problem),) = problems.items()
        raise ConfigError(str(folder / name), [problem])
    if problems:
        raise ConfigError(str(folder), first_told([f"{name} {problem}" for name, problem in problems.items()]))
    return held


def _weight_map(index: Path) -> dict[str, str]:
    """Return in which file each tensor lies, as an index says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConfigError(str(index), ["weight_map: must be an object that names the file of each tensor"])
    wrong = [
        f"weight_map: {shown(name)} is in the file {shown(file)}: must be the name of a file in the same folder"
        for name, file in weight_map.items()
        if not _names_a_file(file)
    ]
    if wrong:
        raise ConfigError(str(index), first_told(wrong))
    return weight_map


def _names_a_file(name: object) -> bool:
    """Say whether a file in a folder can be called so."""
    if not isinstance(name, str) or "\0" in name or name in ("", "..") or Path(name).name != name:
        return False
    try:
        return len(os.fsencode(name)) <= MOST_NAME_BYTES
    except UnicodeEncodeError:  # half of a pair, which JSON can spell
        return False


def _broken_promises(weight_map: dict[str, str], held: dict[str, frozenset[str]]) -> Iterator[str]:
    """Yield each tensor that does not lie where the index says, and each of which it says nothing."""
    for tensor, promised in weight_map.items():
        if tensor not in held[promised]:
            elsewhere = [shown(file) for file, tensors in held.items() if tensor in tensors]
            fits = f"{elsewhere[0]} would fit" if elsewhere else "an index without it would fit"
            yield f"weight_map: {shown(tensor)} is in the file {shown(promised)}: must be there, and is not; {fits}"
    for file, tensors in held.items():
        for tensor in sorted(tensors):
            if tensor not in weight_map:
                yield (
                    f"weight_map: {shown(tensor)} of {shown(file)} is left out: must name each tensor of its files;"
                    f" {shown(file)} would fit"
                )
            elif weight_map[tensor] != file and tensor in held[weight_map[tensor]]:
                yield (
                    f"weight_map: {shown(tensor)} is in the file {shown(weight_map[tensor])}: must be in one file, and"
                    f" is in {shown(file)} too; {shown(file)} without it would fit"
                )


def first_told(problems: list[str]) -> list[str]:
    """Return as many problems as are told, and how many more there are."""
    more = [f"and {len(problems) - MOST_TOLD:,} more"] if len(problems) > MOST_TOLD else []
    return [*problems[:MOST_TOLD], *more]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file that came from another hand.

    Raises:
        ConfigError: if the file cannot be read, or holds no object.
    """
    try:
        content = json.loads(input_bytes(path, MOST_JSON_BYTES))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except RecursionError:
        raise ConfigError(str(path), ["is damaged: lists or objects are nested too deep"]) from None
    except ValueError as error:
        raise ConfigError(str(path), [f"is damaged: not JSON ({error})"]) from None
    if not isinstance(content, dict):
        raise ConfigError(str(path), ["is damaged: not a JSON object"])
    if nesting(content) > MOST_NESTED:
        raise ConfigError(str(path), ["is damaged: lists or objects are nested too deep"])
    return content


def are_the_same(name: str, other: str, file_of: dict[str, Path]) -> bool:
    """Say whether two matrices have the same shape, dtype and bytes; a block of rows of each is held at a time."""
    with safe_open(file_of[name], framework="pt") as file, safe_open(file_of[other], framework="pt") as other_file:
        first, second = file.get_slice(name), other_file.get_slice(other)
        shape = first.get_shape()
        if not shape or shape != second.get_shape() or first.get_dtype() != second.get_dtype():
            return False
        rows = max(1, COMPARED_BYTES // max(1, 8 * prod(shape[1:])))  # of at most 8 bytes each
        return all(
            torch.equal(first[at : at + rows].view(torch.uint8), second[at : at + rows].view(torch.uint8))
            for at in range(0, shape[0], rows)
        )
