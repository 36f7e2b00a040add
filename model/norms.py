"""The norms of a stack, by name: each takes the width and is one line of the table in `model/parts.py`."""

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
