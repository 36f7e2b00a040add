"""Writes safetensors files one tensor at a time, so that a model of any size needs the memory of one tensor.

The library's own writer takes all tensors of a file at once, five gigabytes in a usual file. The format
allows better: the header says where each tensor will lie, and needs only names, shapes and the dtype.

    8 bytes    length of the header, little-endian
    header     {"__metadata__": {"format": "pt"}, "model.norm.weight": {"dtype": "F32", "shape": [64],
               "data_offsets": [0, 256]}, ...}, padded with spaces to a multiple of 8 bytes
    bytes      the tensors, one after the other, without gaps

A model that does not fit into one file is cut at whole tensors, and an index names each tensor's file.
This file knows tensors by name and shape; it knows no model.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DEFAULT_MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class NamedShape:
    """A tensor that is going to be written: what the file calls it, and its shape."""

    name: str
    shape: tuple[int, ...]

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Return how many bytes the tensor takes in a file."""
        return prod(self.shape) * dtype.itemsize


def write_safetensors(
    folder: Path,
    tensors: Sequence[NamedShape],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> dict[str, str]:
    """Write every tensor as `dtype`, calling `read(name)` when its turn comes; return each tensor's file name.

    One file is called `model.safetensors`; several are numbered, and `model.safetensors.index.json` names
    each tensor's file. Every file is on the disk, not only in the system's cache, when this returns.

    Raises:
        ValueError: if `read` gives another shape than was announced, or a name comes twice.
    """
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("two tensors of one export have the same name")
    files = cut_into_files(tensors, dtype, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, file_tensors in enumerate(files, start=1):
        file_name = SINGLE_NAME if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / file_name, file_tensors, read, dtype)
        weight_map |= {tensor.name: file_name for tensor in file_tensors}
    if len(files) > 1:
        total = sum(tensor.num_bytes(dtype) for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return weight_map


def cut_into_files(tensors: Sequence[NamedShape], dtype: torch.dtype, max_shard_bytes: int) -> list[list[NamedShape]]:
    """Return the tensors in their order, cut where a file would pass the limit; a larger tensor stands alone."""
    files: list[list[NamedShape]] = [[]]
    used = 0
    for tensor in tensors:
        size = tensor.num_bytes(dtype)
        if files[-1] and used + size > max_shard_bytes:
            files.append([])
            used = 0
        files[-1].append(tensor)
        used += size
    return files


def write_text(path: Path, text: str) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _write_file(path: Path, tensors: Sequence[NamedShape], read: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    # Unbuffered: a full disk is an error of the write, which names the file, and not of a later flush.
    with path.open("wb", buffering=0) as file:
        _append(file, memoryview(_header(tensors, dtype)), path)
        for tensor in tensors:
            values = read(tensor.name)
            if tuple(values.shape) != tensor.shape:
                raise ValueError(
                    f"{tensor.name} has the shape {list(values.shape)}, the configuration says {list(tensor.shape)}"
                )
            _append(file, _bytes_of(values, dtype), path)
            del values  # before the next is read, so that one is in memory and not two
        os.fsync(file.fileno())


def _header(tensors: Sequence[NamedShape], dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.num_bytes(dtype)
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(values: Tensor, dtype: torch.dtype) -> memoryview:
    """Return a tensor's bytes; safetensors are little-endian, as are all machines that torch has wheels for."""
    flat = values.detach().to(device="cpu", dtype=dtype).contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def _append(file: RawIOBase, data: memoryview, path: Path) -> None:
    while data:  # one call writes at most 2 GiB
        try:
            data = data[file.write(data) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
