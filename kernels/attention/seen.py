"""What a query sees of the keys, and what is done with a score before and after the softmax.

    weight of key j for query i  =  softmax over the seen j of ( scale q_i k_j + bias[head, i - j] )

    causal               j <= i
    window w             i - j < w: a token sees itself and the w - 1 before it (w - 1 after it too, if not causal)
    blocks of size c     j <= i, and i // c - j // c < local or j // c < leading: a token's own block, the local - 1
                         before it, and the first `leading` blocks of the sample

    size 2, local 2, leading 1:    keys      0 0 1 1 2 2 3 3
                                   block 2   x x x x x .
                                   block 3   x x . . x x x .

Positions are those of the whole sample, heads those of the tensor. A bias is a function of the head and the distance
alone (ALiBi, T5), so it is given as one row of distances for each head and never as a matrix of positions.
"""

from numbers import Integral
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Blocks(NamedTuple):
    """Block-sparse attention: the blocks nearest to a token and the first of the sample."""

    size: int
    """Positions of a block."""
    local: int
    """How many blocks a token sees up to its own."""
    leading: int = 0
    """How many blocks every later token sees from the sample's begin."""

    @property
    def can_be(self) -> bool:
        """Say whether these are whole numbers, and large enough."""
        is_whole = all(isinstance(number, Integral) for number in self)
        return is_whole and self.size >= 1 and self.local >= 1 and self.leading >= 0


@runtime_checkable
class Drop(Protocol):
    """Factors of weights, zero for those that are dropped; the same whoever asks, and as often as he does."""

    def factors(
        self, sample: int, heads: range, queries: range, keys: range, like: Tensor
    ) -> Float[Tensor, "heads queries keys"]:
        """Return the factors of some heads' weights, of queries and keys at these positions."""

    def from_head(self, first: int) -> "Drop":
        """Return these factors for a tensor whose heads are those from `first` on."""


class Seen(NamedTuple):
    """Which keys a query sees, and how the scores are weighed."""

    is_causal: bool = True
    window: int = 0
    """0: any distance."""
    blocks: Blocks | None = None
    scale: float | None = None
    """What the products of queries and keys are multiplied by; None: 1 / sqrt(d)."""
    bias: Float[Tensor, "n distances"] | None = None
    """Added to the scores, by distance i - j: from 0 if causal; else from -(distances // 2), of which there are odd."""
    drop: Drop | None = None

    @property
    def is_plain(self) -> bool:
        """Say whether nothing but causality and documents decides, as torch's operators take it."""
        return not self.window and self.blocks is None and self.bias is None and self.drop is None

    def scale_of(self, q: Tensor) -> float:
        """Return the scale, of queries [..., d]."""
        return q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def first_distance(self) -> int:
        """Return which distance the first column of the bias is for."""
        return 0 if self.is_causal or self.bias is None else -(self.bias.shape[1] // 2)

    def key_ranges(self, queries: range, keys: range) -> list[range]:
        """Return the stretches of the keys among which all are that some of the queries see, in order."""
        low, high = keys.start, keys.stop
        if self.is_causal:
            high = min(high, queries.stop)
        if self.window:
            low, high = max(low, queries.start - self.window + 1), min(high, queries.stop - 1 + self.window)
        if self.blocks is None:
            return [range(low, high)] if low < high else []
        size, local, leading = self.blocks
        near = max(low, (queries.start // size - local + 1) * size)
        begin = range(low, min(leading * size, high))
        if begin.stop >= near:
            return [range(low, high)] if low < high else []
        return [part for part in (begin, range(near, high)) if len(part)]

    def sees_all(self, queries: range, keys: range) -> bool:
        """Say whether each of the queries sees each of the keys, documents aside; a careful no is allowed."""
        nearest, farthest = queries.start - (keys.stop - 1), queries.stop - 1 - keys.start
        if self.is_causal and nearest < 0:
            return False
        if self.window and max(farthest, -nearest) >= self.window:
            return False
        return self.blocks is None

    def mask(self, queries: Int[Tensor, " s"], keys: Int[Tensor, " c"]) -> Bool[Tensor, "s c"]:
        """Say for each query and key, given by their positions, whether the one sees the other; documents aside."""
        distance = queries[:, None] - keys[None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.is_causal:
            seen &= distance >= 0
        if self.window:
            seen &= distance.abs() < self.window
        if self.blocks is not None:
            size, local, leading = self.blocks
            of_key = keys // size
            seen &= ((queries // size)[:, None] - of_key[None] < local) | (of_key < leading)[None]
        return seen

    def of_heads(self, first: int, count: int) -> "Seen":
        """Return what is seen by `count` of the heads from `first` on."""
        bias = None if self.bias is None else self.bias[first : first + count]
        return self._replace(bias=bias, drop=None if self.drop is None else self.drop.from_head(first))

    def problems(self) -> list[str]:
        """Return every reason why this is no way to see."""
        found = []
        if not isinstance(self.window, Integral) or self.window < 0:
            found.append(f"window = {self.window}: must be a whole number of at least 1, or 0 for none; 1 would fit")
        if self.blocks is not None and not self.blocks.can_be:
            found.append(
                f"{self.blocks}: size and local must be whole numbers of 1 or more, leading of 0 or more;"
                " Blocks(64, 1) would fit"
            )
        if self.blocks is not None and not self.is_causal:
            found.append("is_causal = False: block-sparse attention is causal; True would fit")
        return found


CAUSAL = Seen()
"""A token sees itself and all before it."""
EVERYTHING = Seen(is_causal=False)
"""Every token sees every other."""
