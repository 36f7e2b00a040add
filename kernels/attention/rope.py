"""Rotary positions: each pair of features of a head is turned by its position's angle.

    y[i]       = x[i] cos - x[i + d/2] sin
    y[i + d/2] = x[i + d/2] cos + x[i] sin            for i < d/2: half-split, "rotate_half"

Where there are angles for less than d/2 pairs, the first features are turned and the others stay.
The gradient is the rotation by the opposite angle, so nothing but the angles is kept for the backward.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from meshwright.kernels.applied import applied
from meshwright.kernels.precision import at_least_fp32


def apply_rope(
    x: Float[Tensor, "s b n d"], cos: Float[Tensor, "s d_half"], sin: Float[Tensor, "s d_half"]
) -> Float[Tensor, "s b n d"]:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle; computed in at least fp32, result in x's dtype."""
    turned = 2 * cos.shape[1]
    if turned < x.shape[3]:
        return torch.cat([apply_rope(x[..., :turned], cos, sin), x[..., turned:]], dim=3)
    return applied(_Rotate, x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = at_least_fp32(x)
    cos, sin = cos.to(wide.dtype)[:, None, None], sin.to(wide.dtype)[:, None, None]
    first, second = wide.chunk(2, dim=-1)
    y = wide * torch.cat([cos, cos], dim=-1)
    y_first, y_second = y.chunk(2, dim=-1)
    y_first.addcmul_(second, sin, value=-1)
    y_second.addcmul_(first, sin)
    return y.to(x.dtype)
