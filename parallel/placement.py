"""How each parameter of this rank was cut from its global self: the table that everything else reads.

A layer holds plain local tensors and says in `placements()` how each was cut; `placement_table` gathers
what all modules say, by global name. Initialisation, gradient reduction, the norm, ZeRO, the checkpoint
and export read this table and nothing else. It is a table and no attribute of the tensors, because
`to_empty` and `fully_shard` replace the tensors and drop what was attached to them.

    global [8, 512, 384]   Split(0, ep=2)             rank 1 holds [4:8]        Placement.offset -> (4, 0, 0)
    global [37, 512]       Split(0, tp=2, size=37)    rank 1 holds [19:37] and one row of padding

Padding is zeros at the end of a part; nothing but the layer that padded ever sees it.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from torch import Tensor, nn

from meshwright.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class Split:
    """Dim `dim` is cut like `torch.chunk` over `axis`; `copies` neighbouring ranks hold the same part."""

    dim: int
    axis: Axis
    copies: int = 1
    size: int = 0
    """Global length of the dim where it does not divide, so that the last parts end in padding; 0 = it divides."""

    @property
    def parts(self) -> int:
        """Return into how many different parts the dim is cut."""
        return self.axis.size // self.copies

    @property
    def index(self) -> int:
        """Return which part this rank holds."""
        return self.axis.rank // self.copies


@dataclass(frozen=True)
class Placement:
    """Where a parameter's elements are and over which ranks its gradient must be summed."""

    splits: tuple[Split, ...] = ()
    grad_sum: tuple[Axis, ...] = ()
    """Axes, beside those of data, over which a rank's gradient is only a part."""
    factorisation: Literal["dense", "expert"] = "dense"
    """`expert`: replicated over edp, not over dp x cp; one of the two factorisations of the mesh."""

    def global_shape(self, local_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that one device would hold."""
        shape = list(local_shape)
        for split in reversed(self.splits):
            shape[split.dim] = split.size or shape[split.dim] * split.parts
        return tuple(shape)

    def offset(self, local_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return where this rank's part begins in the global tensor, for each dim; its end if all of it is padding."""
        start, size = [0] * len(local_shape), list(local_shape)
        for split in reversed(self.splits):  # of two cuts of one dim the first is the outer one
            start[split.dim] += split.index * size[split.dim]
            size[split.dim] *= split.parts
        return tuple(min(begin, whole) for begin, whole in zip(start, self.global_shape(local_shape), strict=True))

    def data_axes(self, mesh: Mesh) -> tuple[Axis, ...]:
        """Return the axes over which different samples gave this gradient, those of state sharding last."""
        if self.factorisation == "expert":
            return (mesh.edp,)
        return (mesh.dp_replicate, mesh.zero)

    def data_axis(self, mesh: Mesh) -> Axis:
        """Return the ranks of `data_axes` as one axis, for a sum that leaves nothing in parts."""
        return mesh.edp if self.factorisation == "expert" else mesh.data

    def zero_axis(self, mesh: Mesh) -> Axis:
        """Return the axis over which ZeRO shards this parameter's state."""
        return self.data_axes(mesh)[-1]


WHOLE = Placement()


def partial_over(*axes: Axis) -> tuple[Axis, ...]:
    """Return those of the axes that have more than one rank, as a placement's `grad_sum`."""
    return tuple(axis for axis in axes if axis.is_split)


def without_padding(tensor: Tensor, global_shape: tuple[int, ...], offset: tuple[int, ...]) -> Tensor:
    """Return the elements of a part that are in the global tensor, as a view."""
    for dim, (begin, whole) in enumerate(zip(offset, global_shape, strict=True)):
        if begin + tensor.shape[dim] > whole:
            tensor = tensor.narrow(dim, 0, whole - begin)
    return tensor


def placement_table(model: nn.Module) -> dict[str, Placement]:
    """Return every parameter's placement by its global name; what no module names is whole.

    A tied parameter stands under the first of its names, as in `named_parameters()`.
    """
    table = {name: WHOLE for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        say = getattr(module, "placements", None)
        if not callable(say):
            continue
        for name, placement in say().items():
            full_name = f"{prefix}.{name}" if prefix else name
            if full_name in table:
                table[full_name] = placement
    return table


def chunk_bounds(size: int, parts: int, index: int) -> tuple[int, int]:
    """Return begin and end of one part of a dim cut as `torch.chunk` cuts it: full parts first, then a short one."""
    step = ceil(size / parts)
    return min(index * step, size), min((index + 1) * step, size)
