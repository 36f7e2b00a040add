"""The norm of a stack: each row is divided by its root mean square and scaled by a learned weight."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.norms import rms_norm
from meshwright.parallel.initialise import ONES, InitRule


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        """Normalise the last dim, of the given size."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return {"weight": ONES}

    def forward(self, x: Float[Tensor, "*tokens h"]) -> Float[Tensor, "*tokens h"]:
        """Normalise each row; the result has x's type."""
        return rms_norm(x, self.weight, self.eps)
