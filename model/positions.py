"""Rotary positions (RoPE; Su et al. 2021): pairs of features turned by an angle that grows with the position.

Half-split, as Llama and Qwen have it: feature i is paired with feature i + d/2, turned by position * base^(-2i/d).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_angles(
    position: Int[Tensor, " s"], head_dim: int, base: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "s half"], Float[Tensor, "s half"]]:
    """Return the cosines and sines of each position's angles, in at least fp32."""
    wide = torch.float32 if position.device.type == "mps" else torch.float64
    exponent = torch.arange(0, head_dim, 2, dtype=wide, device=position.device) / head_dim
    angle = position.to(wide)[:, None] * base**-exponent
    at_least = torch.promote_types(dtype, torch.float32)
    return angle.cos().to(at_least), angle.sin().to(at_least)
