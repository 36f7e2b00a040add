"""Noisy top-k gating (Shazeer et al. 2017, equations 3 to 5): a learned amount of noise on each score, in training.

    scores   x W^T + n * softplus(x V^T)      n: standard normal, drawn by (step, sample, position, expert)
    weight   softmax over the k highest

The noise lets the gradient try neighbours of the k highest. At inference there is none. V begins at zero, so that
every score begins with noise of softplus(0) = 0.69.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.precision import at_least_fp32
from meshwright.model.routers.router import Router
from meshwright.parallel.dropout import normal_noise
from meshwright.parallel.initialise import ZEROS, InitRule
from meshwright.parallel.placement import Placement
from meshwright.parallel.where import Where


class NoisyTopKRouter(Router):
    """Softmax top-k of scores with noise whose scale is learned."""

    normalises = True

    def __init__(self, *sizes: Any, **named: Any) -> None:
        """Take what every router takes."""
        super().__init__(*sizes, **named)
        self.noise_weight = nn.Parameter(torch.empty_like(self.weight))

    def placements(self) -> dict[str, Placement]:
        """Say of both weights what every router says of its one."""
        return dict.fromkeys(("weight", "noise_weight"), super().placements()["weight"])

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return super().init_rules() | {"noise_weight": ZEROS}

    def scores(self, x: Float[Tensor, "*tokens h"], trained: Where | None) -> Float[Tensor, "*tokens e"]:
        """Return the scores, in training with noise."""
        x = at_least_fp32(x)  # once for both products, which keep it
        scores = super().scores(x, trained)
        if trained is None:
            return scores
        scale = F.softplus(x @ at_least_fp32(self.noise_weight).T)
        noise = normal_noise(self.num_experts, where=trained, name=f"{self.name}/router_noise")
        return scores + noise.to(scores.dtype) * scale
