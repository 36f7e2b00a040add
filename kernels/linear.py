"""Products with a weight matrix: x W^T, forward and backward.

This file knows tensors; it knows no layer and no rank.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from meshwright.kernels.precision import autocast_inputs


def linear(
    x: Float[Tensor, "*tokens i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*tokens o"]:
    """Return x W^T + bias, in autocast's dtype where that is on, else in x's."""
    if bias is None:
        return F.linear(*autocast_inputs(x, weight))
    return F.linear(*autocast_inputs(x, weight, bias))
