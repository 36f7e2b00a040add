"""Sigmoid scores with a bias that balances without a loss (Wang et al. 2024; DeepSeek-V3, sections 2.1.2 and 3.2).

    probability   sigmoid(scores), each expert by itself
    ranking       probability + bias, in groups: a group's score is the sum of its two highest
    weight        the probabilities of the chosen (without bias), normalised, times the scale

    after a step  bias_i += bias_rate * sign(mean load - load_i)        load: counted choices of the whole step

The loads are whole numbers, summed over all ranks, and sign(sum - e * load_i) is taken of whole numbers: the bias is
bitwise the same in every layout. It is a buffer, kept with the checkpoint, and has no gradient. The sequence-wise
loss averages probability / sum(probability) (equation 18 there).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from meshwright.model.routers.router import Router
from meshwright.parallel.where import Where


class SigmoidRouter(Router):
    """A sigmoid score for each expert, and the k largest after a bias that only the choice sees."""

    bias: Tensor
    normalises = True
    best_of_group = 2

    def __init__(self, *sizes: Any, **named: Any) -> None:
        """Take what every router takes."""
        super().__init__(*sizes, **named)
        self.register_buffer("bias", torch.empty(self.num_experts, dtype=torch.float32))

    def reset_buffers(self) -> None:
        """Begin without a bias."""
        self.bias.zero_()

    def finish_step(self, sums: dict[str, Tensor]) -> None:
        """Move the bias towards the experts that had less than the mean of the step's choices."""
        load = sums[f"{self.name}.load"]
        missing = torch.sign(load.sum() - self.num_experts * load)
        self.bias.add_(missing.to(self.bias), alpha=self.ways.bias_rate)

    def probability(self, scores: Float[Tensor, "*tokens e"]) -> Float[Tensor, "*tokens e"]:
        """Return sigmoid(scores)."""
        return scores.sigmoid()

    def ranking(self, scores: Tensor, probability: Tensor, trained: Where | None) -> Float[Tensor, "*tokens e"]:
        """Return the probabilities with the bias, within each token's groups."""
        return super().ranking(scores, probability + self.bias.to(probability.dtype), trained)

    def shares(self, probability: Float[Tensor, "*tokens e"]) -> Float[Tensor, "*tokens e"]:
        """Return the probabilities divided by their sum over the experts."""
        return probability / probability.sum(-1, keepdim=True).clamp(min=torch.finfo(probability.dtype).tiny)
