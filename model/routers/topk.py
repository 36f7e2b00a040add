"""Softmax top-k routing: which experts a token goes to, and with what weight.

scores [t, e] = x W^T, in at least fp32      probability = softmax(scores)
expert [t, k] = the k most probable; among equals the lower index (a plain topk picks any)
weight [t, k] = their probabilities, divided by their sum if normalised (Mixtral, Qwen3)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from meshwright.kernels.precision import at_least_fp32
from meshwright.parallel.initialise import InitPolicy, InitRule
from meshwright.parallel.mesh import NO_TP, Axis
from meshwright.parallel.placement import Placement, partial_over


class Routing(NamedTuple):
    """The decision for each token, and the scores that it came from."""

    expert: Int64[Tensor, "t k"]
    weight: Float[Tensor, "t k"]
    scores: Float[Tensor, "t e"]
    probability: Float[Tensor, "t e"]


Decide = Callable[[Callable[[], Tensor]], Tensor]


def plainly(choose: Callable[[], Tensor]) -> Tensor:
    """Make the choice."""
    return choose()


class TopKRouter(nn.Module):
    """A linear score for each expert, softmax, and the k largest."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        normalise: bool = True,
        init: InitPolicy | None = None,
        tp: Axis = NO_TP,
    ) -> None:
        """Take global sizes; each rank of `tp` routes other tokens.

        Raises:
            ValueError: if a token would go to more experts than there are.
        """
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k = {top_k} must be from 1 to num_experts = {num_experts}")
        self.top_k, self.normalise, self.tp = top_k, normalise, tp
        self.rule = (init or InitPolicy()).matrix(hidden_size, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def placements(self) -> dict[str, Placement]:
        """Say that the weight is whole, and its gradient the sum of the ranks'."""
        return {"weight": Placement(grad_sum=partial_over(self.tp))}

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return {"weight": self.rule}

    def scores(self, x: Float[Tensor, "t h"]) -> tuple[Float[Tensor, "t e"], Float[Tensor, "t e"]]:
        """Return each expert's score for each token, and its probability, in at least fp32."""
        with torch.autocast(x.device.type, enabled=False):
            scores = at_least_fp32(x) @ at_least_fp32(self.weight).T
            return scores, scores.softmax(-1)

    def choose(self, probability: Float[Tensor, "t e"]) -> Int64[Tensor, "t k"]:
        """Return each token's experts, the most probable first."""
        # A stable sort, not topk: among equal scores topk returned any of them (42, 43, 44, 41).
        return probability.detach().sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]

    def forward(self, x: Float[Tensor, "t h"], decide: Decide = plainly) -> Routing:
        """Choose each token's experts and weigh them.

        `decide` is called with what makes the choice; a recomputed forward pass is given the first one's choice back.
        """
        scores, probability = self.scores(x)
        expert = decide(lambda: self.choose(probability))
        weight = probability.gather(1, expert)
        if self.normalise:
            weight = weight / weight.sum(-1, keepdim=True)
        return Routing(expert, weight, scores, probability)
