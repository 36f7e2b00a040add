"""Dropout of attention's weights, whose factors belong to the query, the head and the key, not to who computes them.

The factor of a weight is a function of (seed, name of the layer, step, sample, the query's position, head, the key's
position): a stream of its own for each head, in it the place (step, sample, query), and there the key as the index
(`counter_rng.py`). So it is the same over cp and tp, however the samples lie, in whatever tiles the weights are made,
and again in the backward pass, for which it is not kept.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from meshwright.parallel.counter_rng import draw_words, stream_key
from meshwright.parallel.where import Where


@dataclass(frozen=True)
class DroppedWeights:
    """Which weights of a layer are dropped: `kernels/attention/seen.py` asks for their factors."""

    p: float
    seed: int
    name: str
    step: int
    sample: Int64[Tensor, " b"]
    """Global sample indices of the batch."""
    first_head: int = 0
    """Which of the layer's heads is the first of the tensor."""

    def from_head(self, first: int) -> "DroppedWeights":
        """Return these factors for a tensor whose heads are those from `first` on."""
        return replace(self, first_head=self.first_head + first)

    def factors(
        self, sample: int, heads: range, queries: range, keys: range, like: Tensor
    ) -> Float[Tensor, "heads queries keys"]:
        """Return 0 with probability p and else 1 / (1 - p), for each weight."""
        threshold, scale = round(self.p * 2**32), 1.0 / (1.0 - self.p)
        position = torch.arange(queries.start, queries.stop, device=like.device)
        found = like.new_empty(len(heads), len(queries), len(keys))
        for row, head in zip(found, heads, strict=True):
            key = stream_key(self.seed, f"{self.name}/head {self.first_head + head}")
            place = (self.step, self.sample[sample : sample + 1], position)
            row.copy_(draw_words(key, *place, keys.start, len(keys))[:, 0] >= threshold)
        return found.mul_(scale)


def dropped_weights(p: float, where: Where, name: str, first_head: int = 0) -> DroppedWeights:
    """Return the dropout of a layer's weights for this micro-batch.

    Raises:
        ValueError: if p is not a probability below 1.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p = {p} must be at least 0 and below 1")
    return DroppedWeights(p, where.seed, where.draw_name(name), where.step, where.sample, first_head)
