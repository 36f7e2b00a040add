"""Which box of its global tensor each rank holds of a part, by its placement.

A part is cut from its global tensor by the placement's splits, outermost first, then by ZeRO along dim 0. Every rank
can say what any other one holds:

    global [7, 3]   Split(0, tp = 2), padded      rows 0 1 2 3 | 4 5 6 x
                    then ZeRO over zero = 2       rows 0 1, 2 3 | 4 5, 6 x       x: padding, belongs to nobody

`shared_work.py` undoes one cut after the other, innermost first, and brings a matrix to the one rank that works on it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from meshwright.parallel.mesh import Axis, Mesh
from meshwright.parallel.placement import chunk_bounds
from meshwright.parallel.zero.part import Part


class Box(NamedTuple):
    """A stretch of each dim of a global tensor."""

    begin: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Return how many elements it has."""
        return prod(self.size)

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """Return where this box lies in a tensor that holds the outer one."""
        starts = [b - o for b, o in zip(self.begin, outer.begin, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.size, strict=True))


@dataclass(frozen=True)
class Cut:
    """One way in which a tensor was cut: a placement's split, or ZeRO's chunks of dim 0."""

    dim: int
    axis: Axis
    parts: int
    copies: int = 1
    is_padded: bool = True
    """Whether the last parts are as long as the others, filled with padding (a split), or short (ZeRO)."""

    def bounds(self, length: int) -> tuple[int, int]:
        """Return begin and end of this rank's part of a dim of this length."""
        index = self.axis.rank // self.copies
        if not self.is_padded:
            return chunk_bounds(length, self.parts, index)
        step = -(-length // self.parts)
        return index * step, (index + 1) * step

    def on(self, rank: int) -> "Cut":
        """Return the cut as another rank of its axis sees it."""
        return replace(self, axis=replace(self.axis, rank=rank))


def cuts_of(part: Part, mesh: Mesh) -> list[Cut]:
    """Return how a part was cut, outermost first; what is not cut at all is left out."""
    cuts = [Cut(split.dim, split.axis, split.parts, split.copies) for split in part.placement.splits]
    if part.is_zero_part:
        zero = part.placement.zero_axis(mesh)
        cuts.append(Cut(0, zero, zero.size, is_padded=False))
    return [cut for cut in cuts if cut.axis.is_split]


def box_of(global_shape: Sequence[int], cuts: Iterable[Cut]) -> Box:
    """Return what is held after these cuts, as `torch.chunk` cuts; padding at the end is not part of it."""
    begin, end = [0] * len(global_shape), list(global_shape)
    for cut in cuts:
        # Of a dim that does not divide, the last parts are padded: the next cut is of the padded length.
        first, last = cut.bounds(end[cut.dim] - begin[cut.dim])
        begin[cut.dim], end[cut.dim] = begin[cut.dim] + first, begin[cut.dim] + last
    begin = [min(at, size) for at, size in zip(begin, global_shape, strict=True)]
    sizes = [max(0, min(to, size) - at) for at, to, size in zip(begin, end, global_shape, strict=True)]
    return Box(tuple(begin), tuple(sizes))


def boxes_along(global_shape: Sequence[int], cuts: Sequence[Cut]) -> list[Box]:
    """Return what each rank along the axis of the last cut holds, in its order."""
    *others, last = cuts
    return [box_of(global_shape, [*others, last.on(rank)]) for rank in range(last.axis.size)]


def held_box(part: Part, mesh: Mesh) -> Box:
    """Return what a part holds of its global tensor, padding left out; it must be what the part itself says."""
    box = box_of(part.global_shape, cuts_of(part, mesh))
    held = tuple(part.real(part.parameter).shape)
    assert box.size == held, f"{box} is not of the size {held}"
    assert not box.numel or box.begin == part.offset, f"{box} does not begin at {part.offset}"
    return box
