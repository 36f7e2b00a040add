"""Products of each expert's rows with its own weight."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from meshwright.kernels.precision import autocast_inputs


def grouped_linear(
    x: Float[Tensor, "t i"], weight: Float[Tensor, "e o i"], counts: Int[Tensor, " e"]
) -> Float[Tensor, "t o"]:
    """Multiply each expert's rows with its own weight; rows are sorted by expert, counts[e] of them each."""
    x, weight = autocast_inputs(x, weight)
    parts = torch.split(x, counts.tolist())
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weight.unbind(), strict=True)])
