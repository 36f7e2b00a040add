"""The bytes of a checkpoint: raw tensors in one file for each rank, and a table in JSON. No pickle anywhere.

    rank_00000.bin  rank_00001.bin ...   each part's elements, little-endian, C order, each part at a multiple of 64
    tensors.json    {"weight": {"dtype": "bfloat16", "shape": [7, 3], "parts": [
                        {"offset": [0, 0], "shape": [4, 3], "file": "rank_00000.bin", "at": 0, "bytes": 24}, ...]}}

Both classes are a storage pair of `torch.distributed.checkpoint`, which plans who writes what and which bytes a
rank of another layout must read: `dcp.load(..., storage_reader=FolderReader(path))` works on any checkpoint.
This file knows no protocol: what is safe to read is `folder.py`'s.
"""

import json
import os
import sys
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from meshwright.parallel.checkpoint.durable import FileSeal, SealedFile, as_json_bytes, write_file

TABLE_NAME = "tensors.json"
_ALIGNMENT = 64
_READ_BYTES = 64 << 20


@dataclass(frozen=True)
class _Place:
    """Where a part's bytes lie, and what they are."""

    file: str
    at: int
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class FolderWriter(StorageWriter):
    """Writes a rank's parts into one file of a folder; rank 0 also writes the table."""

    def __init__(self, folder: Path) -> None:
        """Take the folder, which must exist."""
        self.folder = folder
        self.seals: dict[str, FileSeal] = {}
        """What this rank wrote: size and hash of each file."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Go on with another folder."""
        if checkpoint_id is not None:
            self.folder = Path(checkpoint_id)
        self.seals = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Need nothing."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank its file's name."""
        return [SavePlan(plan.items, f"rank_{rank:05d}.bin", plan.planner_data) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the plan's parts, one after the other; a rank without any writes no file."""
        results: list[WriteResult] = []
        if plan.items:
            name: str = plan.storage_data
            file = SealedFile(self.folder / name)
            try:
                for item in plan.items:
                    results.append(_write_item(file, name, item, planner))
                self.seals[name] = file.close()
            finally:
                file.abandon()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the table of all ranks' parts."""
        places = {result.index: result.storage_data for of_rank in results for result in of_rank}
        tensors: dict[str, Any] = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            parts = []
            for chunk in entry.chunks:
                place = places[MetadataIndex(name, chunk.offsets)]
                box = {"offset": list(chunk.offsets), "shape": list(chunk.sizes)}
                parts.append(box | {"file": place.file, "at": place.at, "bytes": place.bytes})
            tensors[name] = {"dtype": _dtype_name(entry.properties.dtype), "shape": list(entry.size), "parts": parts}
        self.seals[TABLE_NAME] = write_file(self.folder / TABLE_NAME, as_json_bytes(tensors, readable=False))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Say whether this is a folder."""
        return Path(checkpoint_id).is_dir()


class FolderReader(StorageReader):
    """Reads what `FolderWriter` wrote, only the bytes that a plan asks for."""

    def __init__(self, folder: Path) -> None:
        """Take the folder."""
        self.folder = folder
        self._places: dict[MetadataIndex, _Place] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Go on with another folder."""
        if checkpoint_id is not None:
            self.folder = Path(checkpoint_id)

    def read_metadata(self) -> Metadata:
        """Read the table."""
        return table_from_json((self.folder / TABLE_NAME).read_bytes())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Take the table, and see that each file is long enough for the parts that lie in it."""
        self._places = metadata.storage_data
        ends: dict[str, int] = {}
        for place in self._places.values():
            ends[place.file] = max(ends.get(place.file, 0), place.at + place.bytes)
        for name, end in ends.items():
            size = (self.folder / name).stat().st_size
            if size < end:
                raise ValueError(f"{self.folder / name} is cut short: {size} bytes, the table needs {end}")

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each item into the tensor that the planner names, in the order in which they lie on the disk."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._places[item.storage_index].file, []).append(item)
        for name, items in by_file.items():
            with (self.folder / name).open("rb", buffering=0) as file:
                for item in sorted(items, key=lambda item: self._places[item.storage_index].at):
                    target = planner.resolve_tensor(item).detach()
                    self._read_item(file, item, target)
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_item(self, file: FileIO, item: ReadItem, target: Tensor) -> None:
        """Read a box of a part, whole rows at a time, straight into the target where its memory allows."""
        place = self._places[item.storage_index]
        target = target.view(1) if target.dim() == 0 else target
        first_row = next(iter(item.storage_offsets), 0)
        inner, box = place.shape[1:], tuple(zip(item.storage_offsets[1:], item.lengths[1:], strict=True))
        row_bytes = prod(inner) * place.dtype.itemsize
        whole_rows = all(offset == 0 and n == size for (offset, n), size in zip(box, inner, strict=True))
        step = max(1, _READ_BYTES // max(row_bytes, 1))
        for row in range(0, len(target), step):
            piece = target[row : row + step]
            at = place.at + (first_row + row) * row_bytes
            if whole_rows and piece.dtype == place.dtype and piece.device.type == "cpu" and piece.is_contiguous():
                self._read_exactly(file, _bytes_of(piece), at)
                continue
            read = torch.empty(len(piece), *inner, dtype=place.dtype)
            self._read_exactly(file, _bytes_of(read), at)
            for dim, (offset, length) in enumerate(box, start=1):
                read = read.narrow(dim, offset, length)
            piece.copy_(read)

    def _read_exactly(self, file: FileIO, buffer: memoryview, at: int) -> None:
        file.seek(at)
        while buffer:
            count = file.readinto(buffer)
            if not count:
                raise ValueError(f"{file.name!s} is cut short: it ends at byte {file.tell()}")
            buffer = buffer[count:]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Say whether the folder holds a table."""
        return (Path(checkpoint_id) / TABLE_NAME).is_file()


def table_from_json(text: bytes) -> Metadata:
    """Rebuild DCP's metadata from the table."""
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _Place] = {}
    for name, tensor in json.loads(text).items():
        chunks = []
        dtype = _dtype_of(tensor["dtype"])
        for part in tensor["parts"]:
            offset = torch.Size(part["offset"])
            chunks.append(ChunkStorageMetadata(offset, torch.Size(part["shape"])))
            places[MetadataIndex(name, offset)] = _Place(
                part["file"], part["at"], part["bytes"], tuple(part["shape"]), dtype
            )
        properties = TensorProperties(dtype=dtype)
        entries[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
    return Metadata(entries, storage_data=places)


def _write_item(file: SealedFile, name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
    if item.type == WriteItemType.BYTE_IO:
        raise ValueError(f"{item.index.fqn} is no tensor: small values belong into the checkpoint's state")
    file.append(bytes(-file.size % _ALIGNMENT))
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor)
    at = file.size
    file.append(_bytes_of(tensor.detach().cpu().contiguous()))
    size = file.size - at
    return WriteResult(item.index, size, _Place(name, at, size, tuple(tensor.shape), tensor.dtype))


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a contiguous CPU tensor's own memory."""
    assert sys.byteorder == "little", "the files are little-endian, and elements are not swapped"
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"this version of torch has no dtype {name!r}")
    return dtype
