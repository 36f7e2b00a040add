"""The gated norm at the end of Mamba-2: y silu(z), normalised within each group of channels, scaled.

    u = y silu(z)      r = 1 / sqrt(mean(u^2) + eps), one number for each token and group      out = u r w

    with c = sum of (grad w u) over a group of m channels:   du = r (grad w) - u r^3 c / m,   dw = sum_t grad u r

Where the channels of a group lie on several ranks, each sums its own, and `complete` adds the sums of all of them: once
in the forward pass, for u^2, and once in the backward, for c. Kept are y, z and r; u is made again.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from meshwright.kernels.applied import applied
from meshwright.kernels.precision import at_least_fp32

Complete = Callable[[Tensor], None]
"""Adds to a sum, in place, those of the ranks that hold the other channels of its group."""


def whole(total: Tensor) -> None:
    """Leave a sum as it is: all channels are here."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gated_rms_norm(
    y: Float[Tensor, "*tokens c"],
    z: Float[Tensor, "*tokens c"],
    weight: Float[Tensor, " c"],
    eps: float,
    *,
    group_size: int,
    complete: Complete = whole,
) -> Float[Tensor, "*tokens c"]:
    """Return the normalised y silu(z) in y's type; `group_size` counts a group's channels on all ranks.

    Where it exceeds the channels that are here, these are a part of one group.
    """
    return applied(_GatedRmsNorm, y, z, weight, eps, group_size, complete)


class _GatedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, complete: Complete
    ) -> Tensor:
        here = min(group_size, y.shape[-1])
        u = torch.unflatten(F.silu(at_least_fp32(z)).mul_(y), -1, (-1, here))
        square = torch.linalg.vector_norm(u, dim=-1, keepdim=True).square_()
        complete(square)
        r = square.div_(group_size).add_(eps).rsqrt_()
        ctx.save_for_backward(y, z, weight, r)
        ctx.group_size, ctx.complete = group_size, complete
        out: Tensor = u.mul_(r).flatten(-2).mul_(weight)
        return out.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, r = ctx.saved_tensors
        gate = F.silu(at_least_fp32(z))
        here = min(ctx.group_size, y.shape[-1])
        grad = torch.unflatten(at_least_fp32(grads[0]), -1, (-1, here))
        u = torch.unflatten(gate * y, -1, (-1, here))
        w = at_least_fp32(weight).view(-1, here)
        product = grad * u
        of_weight = (product * r).flatten(0, -3).sum(0).flatten()
        c = torch.einsum("...gm,gm->...g", product, w)[..., None]
        ctx.complete(c)
        c.mul_(r).mul_(r).mul_(r).div_(-ctx.group_size)
        du = (grad * w).mul_(r).addcmul_(u, c).flatten(-2)
        of_z = torch.ops.aten.silu_backward(du * y, at_least_fp32(z))
        return du.mul_(gate).to(y.dtype), of_z.to(z.dtype), of_weight.to(weight.dtype), None, None, None
