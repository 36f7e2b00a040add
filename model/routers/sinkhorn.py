"""Sinkhorn routing (Clark et al. 2022, "S-BASE"; as megatron-core's `sinkhorn` computes it): balanced choices, no loss.

In training the scores of a sequence, c = exp(scores) [s, e], are scaled by rows and columns until every expert has the
same part of the whole, and the choice goes by the result; weights come from the scores themselves:

    d0 = 1 / s / (c d1 + eps)        one for each token
    d1 = 1 / e / (d0 c + eps)        one for each expert; repeated until d1 changes by no more than 1e-4 on average
    ranking = d1 * c * d0            within a token's row d0 changes nothing

    weight: sigmoid of the score for k = 1, softmax over all experts for k > 1; never made to sum to 1

megatron-core balances over a micro-batch of a rank; here over one sequence, gathered over its ranks, so that the result
depends on neither. Padding takes no part in the balance. A choice in training depends on later tokens of the sequence;
at inference, as in evaluation, the choice goes by the weights, and no token sees a later one.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meshwright.model.routers.router import Router
from meshwright.parallel.sequence_order import order_of, whole_sequences
from meshwright.parallel.where import Where

_EPS, _TOLERANCE = 1e-8, 1e-4
# Scores that differ by hundreds settle slowly, or, in theory, never.
_MOST_ROUNDS = 1000


def sinkhorn_columns(scores: Float[Tensor, "s b e"], counted: Bool[Tensor, "s b"]) -> Float[Tensor, "b e"]:
    """Return d1 of each sequence; computed in fp64 where the device has it."""
    wide = torch.float32 if scores.device.type == "mps" else torch.float64
    cost = scores.to(wide).exp() * counted[..., None]
    tokens = counted.sum(0).clamp(min=1).to(wide)[:, None]
    columns = cost.new_ones(cost.shape[1:])
    moves = torch.ones_like(tokens, dtype=torch.bool)
    for _ in range(_MOST_ROUNDS):
        rows = counted / (tokens.T * ((cost * columns).sum(-1) + _EPS))
        found = 1.0 / (cost.shape[2] * ((cost * rows[..., None]).sum(0) + _EPS))
        # A sequence that has settled stays: its result must not depend on the others of the micro-batch.
        settled = (found - columns).abs().mean(-1, keepdim=True) <= _TOLERANCE
        columns = torch.where(moves, found, columns)
        moves = moves & ~settled
        if not moves.any():
            break
    return columns


class SinkhornRouter(Router):
    """Choices of one sequence spread evenly over the experts in training; the k best at inference."""

    normalises = None

    def probability(self, scores: Float[Tensor, "*tokens e"]) -> Float[Tensor, "*tokens e"]:
        """Return sigmoid(scores) for one expert a token, softmax(scores) for more."""
        return scores.sigmoid() if self.top_k == 1 else scores.softmax(-1)

    def ranking(self, scores: Tensor, probability: Tensor, trained: Where | None) -> Float[Tensor, "*tokens e"]:
        """Return the balanced scores in training, and the probabilities at inference."""
        if trained is None:
            return probability
        counted = order_of(trained, self.token).counted
        columns = sinkhorn_columns(whole_sequences(scores, trained, self.token), counted)
        return scores.to(columns.dtype).exp() * columns

    def shares(self, probability: Float[Tensor, "*tokens e"]) -> Float[Tensor, "*tokens e"]:
        """Return the probabilities divided by their sum over the experts."""
        return probability / probability.sum(-1, keepdim=True).clamp(min=torch.finfo(probability.dtype).tiny)
