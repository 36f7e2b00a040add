"""Rotary positions: each pair of features of a head is turned by its position's angle."""

import torch
from jaxtyping import Float
from torch import Tensor

from meshwright.kernels.precision import at_least_fp32


def apply_rope(
    x: Float[Tensor, "s b n d"], cos: Float[Tensor, "s d_half"], sin: Float[Tensor, "s d_half"]
) -> Float[Tensor, "s b n d"]:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: the half-split ("rotate_half") layout."""
    first, second = at_least_fp32(x).chunk(2, dim=-1)
    cos, sin = cos[:, None, None].to(first.dtype), sin[:, None, None].to(first.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
