"""The norm of a stack: each row is divided by its root mean square and scaled by a learned weight."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.norms import rms_norm
from meshwright.parallel.initialise import ONES, InitRule
from meshwright.parallel.mesh import NO_TP, Axis
from meshwright.parallel.placement import Placement, partial_over


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float, *, tp: Axis = NO_TP) -> None:
        """Normalise the last dim, of the given size; each rank of `tp` sees other tokens, or other heads."""
        super().__init__()
        self.eps, self.tp = eps, tp
        self.weight = nn.Parameter(torch.empty(size))

    def placements(self) -> dict[str, Placement]:
        """Say that the weight is whole, and its gradient the sum of the ranks'."""
        return {"weight": Placement(grad_sum=partial_over(self.tp))}

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return {"weight": ONES}

    def forward(self, x: Float[Tensor, "*tokens h"]) -> Float[Tensor, "*tokens h"]:
        """Normalise each row; the result has x's type."""
        return rms_norm(x, self.weight, self.eps)
