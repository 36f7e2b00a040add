"""What one rank holds of a global tensor: the tensor, the global shape, and where in it the part begins.

A checkpoint knows global tensors only. A rank's part follows from two cuts, in this order:

    placement's splits      padded locally: every rank holds ceil(size / parts) rows, the last ones may be padding
    ZeRO, when zero_part    dim 0 of what the rank holds, like torch.chunk: the last parts are short or empty

    global [7, 3], split over ep = 2, then ZeRO over edp = 2       x: padding, written by nobody
        ep 0   rows 0 1 2 3   ->   edp 0: [0:2]   edp 1: [2:4]
        ep 1   rows 4 5 6 x   ->   edp 0: [4:6]   edp 1: [6:7]

FSDP2 cuts in the same way (its own DTensor's shape is that of the local tensor: pass `parameter.to_local()`),
and so do nested `Shard(0)`s of torch's DTensor on a mesh ordered (split axis, ZeRO axis).
"""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from meshwright.parallel.mesh import Mesh
from meshwright.parallel.placement import Placement, chunk_bounds


@dataclass(frozen=True)
class HeldPart:
    """A box of a global tensor, held in `tensor`; saving reads it, loading fills it in place."""

    tensor: Tensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]


def describe(
    tensor: Tensor, global_shape: tuple[int, ...], placement: Placement, mesh: Mesh, *, zero_part: bool
) -> HeldPart:
    """Say which part of the global tensor this rank's `tensor` is; padding is cut off.

    With `zero_part` the tensor is the rank's dim-0 chunk over `placement.zero_axis(mesh)` (padded to the length of
    the first chunk, or not); without, it is whole but for the placement's splits.

    Raises:
        ValueError: if the tensor's shape is not that of this rank's part, or it is a DTensor, whose own global
            shape would leave out the placement's splits.
    """
    if isinstance(tensor, DTensor):
        raise ValueError("a DTensor does not know the placement's splits: describe its local part, tensor.to_local()")
    if zero_part and not global_shape:
        raise ValueError("a tensor without dims has no part of its own: zero_part must be False")
    begin, length = [0] * len(global_shape), list(global_shape)
    for split in placement.splits:
        length[split.dim] = -(-length[split.dim] // split.parts)
        begin[split.dim] += split.index * length[split.dim]
    padded = list(length)
    if zero_part:
        axis = placement.zero_axis(mesh)
        first, last = chunk_bounds(length[0], axis.size, axis.rank)
        padded[0] = chunk_bounds(length[0], axis.size, 0)[1]
        begin[0], length[0] = begin[0] + first, last - first
    begin = [min(b, size) for b, size in zip(begin, global_shape, strict=True)]
    real = [min(n, size - b) for b, n, size in zip(begin, length, global_shape, strict=True)]
    possible = list(zip(real, length, padded, strict=True))
    if tensor.dim() != len(possible) or any(n not in sizes for n, sizes in zip(tensor.shape, possible, strict=True)):
        raise ValueError(
            f"this rank's part of {list(global_shape)} is {real} at {begin}, but the tensor is {list(tensor.shape)}"
        )
    for dim, size in enumerate(real):
        tensor = tensor.narrow(dim, 0, size)
    return HeldPart(tensor, global_shape, tuple(begin))
