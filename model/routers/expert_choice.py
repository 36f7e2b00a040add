"""Expert-choice routing (Zhou et al. 2022): experts choose tokens, so all have one load and no loss is needed.

In training each expert takes, of every sequence, the `capacity` counted tokens to which it is most probable:

    probability  softmax over the experts          capacity = ceil(top_k * tokens / experts)
    a token has as many experts as took it, none to all, top_k on average; its weights are their probabilities

    token        0    1    2    3        top_k = 1, 4 tokens, 2 experts: each takes two
    expert A    .9   .6   .7   .2        0, 2
    expert B    .1   .4   .3   .8        3, 1

The caveat: whether an expert takes a token depends on the probabilities of later tokens, which a decoder cannot
know. The paper is of no help there ("batching" later tokens is all it offers); Raposo et al. 2024 (section 3.5), who
choose tokens in this way, let a threshold decide. So it is done here: each expert has a threshold that follows the
probability at which its capacity is reached,

    after a step   threshold_i += bias_rate * sign(tokens above it - tokens taken)        counts of the whole step

and at inference, as in evaluation, a token goes to the experts whose thresholds its probabilities pass. Thresholds are
a buffer, kept with the checkpoint; they move by the sign of whole numbers summed over all ranks, and so are bitwise the
same in every layout.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from meshwright.model.routers.capacity import capacity_of, first_tokens
from meshwright.model.routers.router import Router, Routing
from meshwright.parallel.sequence_order import order_of, whole_sequences
from meshwright.parallel.tally import Tally
from meshwright.parallel.where import Where


class ExpertChoiceRouter(Router):
    """Each expert takes the tokens of a sequence that suit it best; a token has from none to all of the experts."""

    threshold: Tensor
    normalises = None

    def __init__(self, *sizes: Any, **named: Any) -> None:
        """Take what every router takes; `top_k` is how many experts a token has on average."""
        super().__init__(*sizes, **named)
        self.register_buffer("threshold", torch.empty(self.num_experts, dtype=torch.float32))

    @property
    def most_choices(self) -> int:
        """Return how many experts a token can have: all."""
        return self.num_experts

    def reset_buffers(self) -> None:
        """Begin where a router that does not know better stands: every expert as probable as the others."""
        self.threshold.fill_(1.0 / self.num_experts)

    def tally_entries(self) -> dict[str, int]:
        """Declare how many of a step's tokens pass each expert's threshold."""
        return {f"{self.name}.passed": self.num_experts}

    def finish_step(self, sums: dict[str, Tensor]) -> None:
        """Move each threshold towards the one that as many tokens pass as the expert took."""
        towards = torch.sign(sums[f"{self.name}.passed"] - sums[f"{self.name}.load"])
        self.threshold.add_(towards.to(self.threshold), alpha=self.ways.bias_rate)

    def forward(self, x: Float[Tensor, "*tokens h"], where: Where | None = None) -> Routing:
        """Let the experts take their tokens in training, and the thresholds decide at inference."""
        trained = where if self.training else None
        with torch.autocast(x.device.type, enabled=False):
            scores = self.scores(self._jittered(x, trained), trained)
            probability = self.probability(scores)

            expert, taken = self.decide("experts", where, lambda: as_choices(self.take(probability.detach(), trained)))
            weight = self.weigh(probability.gather(-1, expert)) * taken
            return Routing(expert, weight, scores, probability, taken)

    def take(self, probability: Float[Tensor, "*tokens e"], trained: Where | None) -> Bool[Tensor, "*tokens e"]:
        """Say which experts take each token: the best of the sequences of `trained`, else all above the thresholds."""
        return self._passed(probability) if trained is None else self._best(probability, trained)

    def count(self, routing: Routing, where: Where, tally: Tally) -> None:
        """Count the tokens that pass each expert's threshold."""
        passed = self._passed(routing.probability) & where.counted[..., None]
        tally.add(f"{self.name}.passed", passed.sum((0, 1)))

    def _passed(self, probability: Tensor) -> Tensor:
        return probability > self.threshold.to(probability.dtype)

    def _best(self, probability: Tensor, where: Where) -> Tensor:
        capacity = capacity_of(where.sequence_tokens, 1.0, self.top_k, self.num_experts)
        order = order_of(where, self.token)
        whole = whole_sequences(probability, where, self.token)
        return first_tokens(whole, order.counted, capacity)[order.held]


def as_choices(takes: Bool[Tensor, "*tokens e"]) -> tuple[Int64[Tensor, "*tokens k"], Bool[Tensor, "*tokens k"]]:
    """Return each token's experts in ascending order, and which of the k places are filled.

    k is the most experts that any token here has, and at least 1; the places behind a token's last are not taken.
    """
    order = (~takes).to(torch.int8).argsort(dim=-1, stable=True)
    most = max(1, int(takes.sum(-1).max().item())) if takes.numel() else 1
    expert = order[..., :most].contiguous()  # what is kept of it for the backward pass is not all experts
    return expert, takes.gather(-1, expert)
