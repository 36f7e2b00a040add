"""The two ends of a language model: token ids to vectors, and vectors to a loss or to logits."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from meshwright.kernels.cross_entropy import linear_cross_entropy
from meshwright.kernels.linear import linear
from meshwright.parallel.initialise import InitPolicy, InitRule


class Embedding(nn.Module):
    """A vector for each token id."""

    def __init__(self, vocab_size: int, hidden_size: int, *, init: InitPolicy | None = None) -> None:
        """Take global sizes."""
        super().__init__()
        self.rule = (init or InitPolicy()).embedding(vocab_size, hidden_size)
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return {"weight": self.rule}

    def forward(self, tokens: Int64[Tensor, "s b"]) -> Float[Tensor, "s b h"]:
        """Look the vectors up."""
        return F.embedding(tokens, self.weight)


def next_token_loss(
    x: Float[Tensor, "s b h"], weight: Float[Tensor, "v h"], targets: Int64[Tensor, "s b"], step_tokens: float
) -> Float[Tensor, ""]:
    """Return the summed cross entropy of the counted targets, divided by the counted tokens of the whole step."""
    return linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), divisor=step_tokens)


def next_token_logits(x: Float[Tensor, "s b h"], weight: Float[Tensor, "v h"]) -> Float[Tensor, "s b v"]:
    """Return a score for every token of the vocabulary."""
    return linear(x, weight)
