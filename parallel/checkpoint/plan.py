"""Who writes what, who reads what: torch's default planners over parts described by `HeldPart`.

Saving, a part that several ranks hold is written by one of them, so that each writes about as much. Before that
rank 0 sees whether all of them hold the same: torch itself would keep one and drop the others without a word
(two different parts saved under one name, each as if it were the whole).
"""

from dataclasses import replace
from math import prod

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from meshwright.parallel.checkpoint.describe import HeldPart

_SAMPLED = 64
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PartSavePlanner(DefaultSavePlanner):
    """Plans the writing of parts; `snapshot` makes it independent of the tensors that training goes on changing."""

    def __init__(self, parts: dict[str, HeldPart]) -> None:
        """Take what this rank holds."""
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts
        self.set_up_planner({}, is_coordinator=True)

    def create_local_plan(self) -> SavePlan:
        """List this rank's parts, with a sample of each part's elements for comparison with other ranks."""
        items, samples = [], {}
        for name, part in self.parts.items():
            # A part without elements would be written at an offset where another rank's part may begin.
            if part.tensor.numel() == 0 and prod(part.global_shape) > 0:
                continue
            offset = part.offset if part.tensor.numel() else (0,) * len(part.global_shape)
            sizes = part.tensor.shape if part.tensor.numel() else torch.Size(part.global_shape)
            chunk = ChunkStorageMetadata(torch.Size(offset), sizes)
            properties = TensorProperties(dtype=part.tensor.dtype)
            data = TensorWriteData(chunk, properties, torch.Size(part.global_shape))
            index = MetadataIndex(name, offset)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            samples[index] = _sample(part.tensor)
        self.plan = SavePlan(items, planner_data=samples)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Choose one writer for each part.

        Raises:
            ValueError: if ranks disagree about a tensor, or the parts overlap or leave a hole.
        """
        problems = _disagreements(all_plans)
        if problems:
            raise ValueError("; ".join(problems))
        plans, metadata = super().create_global_plan([replace(plan, planner_data=None) for plan in all_plans])
        holes = _holes(metadata)
        if holes:
            raise ValueError("; ".join(holes))
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the tensor that an item of the plan writes."""
        return self.parts[index.fqn].tensor

    def snapshot(self, plan: SavePlan) -> None:
        """Copy to the CPU what this rank will write, and let go of everything else."""
        names = [item.index.fqn for item in plan.items]
        copied = {name: self.parts[name].tensor.detach().to("cpu", copy=True) for name in names}
        self.parts = {name: replace(self.parts[name], tensor=tensor) for name, tensor in copied.items()}


class PartLoadPlanner(DefaultLoadPlanner):
    """Plans the reading of parts, from however many parts they were written in."""

    def __init__(self, parts: dict[str, HeldPart], metadata: Metadata) -> None:
        """Take what this rank holds, and the checkpoint's table."""
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts
        self.set_up_planner({}, metadata)

    def create_local_plan(self) -> LoadPlan:
        """List the boxes to read.

        Raises:
            ValueError: if the checkpoint's parts leave a hole in a tensor that this rank holds.
        """
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, part in self.parts.items():
            entry = self.metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            if part.tensor.numel() == 0:
                continue
            wanted = ChunkStorageMetadata(torch.Size(part.offset), part.tensor.shape)
            found = create_read_items_for_chunk_list(name, entry, [wanted])
            if sum(prod(item.lengths) for item in found) != part.tensor.numel():
                raise ValueError(f"{name}: the checkpoint's parts do not cover {list(wanted.sizes)} at {part.offset}")
            items += found
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the tensor that an item of the plan fills."""
        return self.parts[index.fqn].tensor.detach()


def _sample(tensor: Tensor) -> int:
    """Return a hash of up to 64 elements, evenly spread: enough to tell two parts apart, cheap on a GPU."""
    count = tensor.numel()
    if count == 0 or tensor.element_size() not in _INTEGER:
        return 0
    bits = tensor.detach().view(_INTEGER[tensor.element_size()])
    at = torch.arange(min(_SAMPLED, count)) * (count - 1) // max(min(_SAMPLED, count) - 1, 1)
    return int(xxhash.xxh3_64_intdigest(bits.take(at.to(tensor.device)).cpu().numpy().tobytes()))


def _disagreements(plans: list[SavePlan]) -> list[str]:
    """Return in which tensors two ranks contradict each other."""
    tensors: dict[str, tuple[int, object]] = {}
    parts: dict[MetadataIndex, tuple[int, object]] = {}
    problems: dict[str, str] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            assert item.tensor_data is not None
            name, data = item.index.fqn, item.tensor_data
            kind = (list(data.size), str(data.properties.dtype).removeprefix("torch."))
            first, expected = tensors.setdefault(name, (rank, kind))
            if kind != expected:
                problems.setdefault(name, f"{name} is {expected} on rank {first}, {kind} on rank {rank}")
            held = (data.chunk.sizes, plan.planner_data[item.index])
            first, expected = parts.setdefault(item.index, (rank, held))
            if held != expected:
                where = f"the part of {name} at {list(data.chunk.offsets)}"
                problems.setdefault(
                    name, f"ranks {first} and {rank} both hold {where}, but not the same: is its placement right?"
                )
    return list(problems.values())


def _holes(metadata: Metadata) -> list[str]:
    """Return which tensors have elements that no rank holds (torch looks only where there are several ranks)."""
    holes = []
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        held, size = sum(prod(chunk.sizes) for chunk in entry.chunks), prod(entry.size)
        if held != size:
            holes.append(f"{name} {list(entry.size)}: the ranks hold {held} of {size} elements")
    return holes
