"""What the optimizer updates: this rank's part of each parameter, in at least fp32, with its gradient.

Every way of sharding state (ZeRO-0 to ZeRO-3) ends in a table of these parts. A part is an ordinary tensor:
the parameter itself, some rows of it, or a master copy in fp32. The optimizer, the gradient norm, the
checkpoint and the initialisation see parts and do not know by which way they came.
"""

from dataclasses import dataclass

import torch
from torch import nn

from meshwright.parallel.mesh import Axis, Mesh
from meshwright.parallel.placement import Placement, chunk_bounds, without_padding


@dataclass(frozen=True)
class Part:
    """A rank's part of one parameter: `parameter.grad` holds the summed gradient once a step's reduction is done."""

    parameter: nn.Parameter
    placement: Placement
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Where the part begins in the global tensor."""
    is_zero_part: bool
    """Whether dim 0 was cut over the placement's ZeRO axis, after the placement's own splits."""
    split_axes: tuple[Axis, ...]
    """The axes over which different ranks hold different elements."""

    def real(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the elements of a tensor of this part's shape that are in the global tensor: all but padding."""
        return without_padding(tensor, self.global_shape, self.offset)


def make_part(
    tensor: torch.Tensor, local_shape: tuple[int, ...], placement: Placement, mesh: Mesh, *, is_zero_part: bool
) -> Part:
    """Describe a part held in `tensor`, cut from the local parameter of shape `local_shape`."""
    offset = placement.offset(local_shape)
    axes = [split.axis for split in placement.splits]
    if is_zero_part:
        zero = placement.zero_axis(mesh)
        begin, _ = chunk_bounds(local_shape[0], zero.size, zero.rank)
        whole = placement.global_shape(local_shape)
        offset = (min(offset[0] + begin, whole[0]), *offset[1:])
        axes.append(zero)
    return Part(
        parameter=nn.Parameter(tensor.detach(), requires_grad=False),
        placement=placement,
        global_shape=placement.global_shape(local_shape),
        offset=offset,
        is_zero_part=is_zero_part,
        split_axes=tuple(axis for axis in axes if axis.is_split),
    )
