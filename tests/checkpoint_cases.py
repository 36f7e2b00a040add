"""A small model's state for the checkpoint tests: every global tensor is known, each rank cuts its parts from it.

Sizes are uneven on purpose: 5, 6 and 7 rows over 4 ranks, fewer rows than ranks, one expert a rank cut in two.
"""

import zlib
from pathlib import Path

import torch
from torch import Tensor

from meshwright.parallel.checkpoint.describe import HeldPart, describe
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.placement import WHOLE, Placement, Split

DENSE = {
    "weight": ((7, 3), torch.float32),
    "bias": ((5,), torch.bfloat16),
    "tiny": ((2, 5), torch.float64),
    "six": ((6, 2), torch.float32),
    "scalar": ((), torch.int64),
    "mask": ((3, 3), torch.bool),
    "empty": ((0, 4), torch.float32),
}
EXPERT = {"gate": ((6, 5, 4), torch.float32), "one_each": ((2, 3), torch.bfloat16)}
SHAPES = DENSE | EXPERT


def whole(name: str, seed: int = 0) -> Tensor:
    """Return a global tensor; its numbers depend on its name and the seed."""
    shape, dtype = SHAPES[name.removeprefix("moment.")]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 100).to(dtype)


def placement_of(name: str, mesh: Mesh) -> Placement:
    """Experts are split over ep, all else is whole."""
    if name.removeprefix("moment.") in EXPERT:
        return Placement(splits=(Split(0, mesh.ep),), factorisation="expert")
    return WHOLE


def cut(tensor: Tensor, placement: Placement, mesh: Mesh, zero_part: bool) -> Tensor:
    """Cut a rank's part by torch.chunk: not the arithmetic that is tested."""
    for split in placement.splits:
        tensor = tensor.chunk(split.parts, dim=split.dim)[split.index]
    if zero_part:
        axis = placement.zero_axis(mesh)
        chunks = tensor.chunk(axis.size)
        tensor = chunks[axis.rank] if axis.rank < len(chunks) else tensor[:0]
    return tensor.clone()


def held_state(mesh: Mesh, *, zero: bool, seed: int = 0, blank: bool = False) -> dict[str, HeldPart]:
    """Return the parts of this rank: weights whole, moments cut by ZeRO where `zero`; all zeros if `blank`."""
    parts = {}
    for name in SHAPES:
        placement = placement_of(name, mesh)
        for full_name in (name, f"moment.{name}"):
            global_tensor = whole(full_name, seed)
            is_cut = zero and full_name != name and global_tensor.dim() > 0
            local = cut(global_tensor, placement, mesh, is_cut)
            local = torch.zeros_like(local) if blank else local
            parts[full_name] = describe(local, tuple(global_tensor.shape), placement, mesh, zero_part=is_cut)
    return parts


def assert_holds(parts: dict[str, HeldPart], mesh: Mesh, *, zero: bool, seed: int = 0) -> None:
    """See that every part is bit for bit what the global tensors say."""
    expected = held_state(mesh, zero=zero, seed=seed)
    assert parts.keys() == expected.keys()
    for name, part in parts.items():
        assert torch.equal(part.tensor, expected[name].tensor), name


def names_in(folder: Path) -> list[str]:
    """Return what lies in a folder."""
    return sorted(path.name for path in folder.iterdir())
