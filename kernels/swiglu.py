"""The gated unit silu(gate) * up."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def swiglu(gate: Float[Tensor, "*tokens f"], up: Float[Tensor, "*tokens f"]) -> Float[Tensor, "*tokens f"]:
    """Return silu(gate) * up in gate's dtype."""
    return F.silu(gate) * up
