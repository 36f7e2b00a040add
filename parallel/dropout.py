"""Dropout, jitter and noise, whose random numbers belong to the token and the feature, not to the rank that holds them.

    dropout   y = x * 0 or x / (1 - p)         an element stays if its 32 bits are at least p * 2^32
    jitter    y = x * u,  u in (1 - e, 1 + e)  evenly spread
    noise     n           standard normal

The factor of an element is a function of (seed, name of the layer, step, sample, position, feature): the same bits
however the tokens are cut over cp and tp, the samples over ranks and micro-batches and the features over tp. It is
therefore not kept for the backward pass, which makes it again, piece by piece. Rows that were sent to an expert say
themselves which token they are (`RowsOf`); the expert's number is a part of the draw's place. This file
asks nobody whether there is training: a caller that evaluates does not call it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from meshwright.kernels.limits import Limits
from meshwright.parallel.counter_rng import draw_row_words, draw_words, stream_key
from meshwright.parallel.where import Where

# Words of 32 bits and the type in which they are multiplied to factors.
OfWords = Callable[[Tensor, torch.dtype], Tensor]


def dropout(
    x: Float[Tensor, "s b h"],
    p: float,
    *,
    where: Where,
    name: str,
    position: Int64[Tensor, " s"] | None = None,
    first_feature: int = 0,
) -> Float[Tensor, "s b h"]:
    """Zero elements with probability `p` and divide the others by 1 - p.

    `position` is that of x's tokens where they are not those held between layers; `first_feature` says which part of
    the features this is. Two draws of one layer need two names.

    Raises:
        ValueError: if p is not a probability below 1.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p = {p} must be at least 0 and below 1")
    if p == 0.0:
        return x
    return _scaled(x, _dropping(p), _place(where, name, position, first_feature))


def jitter(
    x: Float[Tensor, "s b h"],
    eps: float,
    *,
    where: Where,
    name: str,
    position: Int64[Tensor, " s"] | None = None,
    first_feature: int = 0,
) -> Float[Tensor, "s b h"]:
    """Multiply each element by a number between 1 - eps and 1 + eps (Fedus et al. 2021, on a router's input).

    Raises:
        ValueError: if eps is not from 0 to 1.
    """
    if not 0.0 <= eps <= 1.0:
        raise ValueError(f"eps = {eps} must be from 0 to 1")
    if eps == 0.0:
        return x
    wide = torch.float32 if x.device.type == "mps" else torch.float64

    def factors(words: Tensor, dtype: torch.dtype) -> Tensor:
        return (words.to(wide) + 0.5).mul_(2.0 * eps / 2.0**32).add_(1.0 - eps).to(dtype)

    return _scaled(x, factors, _place(where, name, position, first_feature))


def normal_noise(count: int, *, where: Where, name: str) -> Float[Tensor, "s b n"]:
    """Return `count` standard normal numbers for each token held between layers."""
    place = _place(where, name, None, 0)
    words = _words_of_tokens(place, count)
    wide = torch.float32 if words.device.type == "mps" else torch.float64
    uniform = (words.to(wide) + 0.5) / 2.0**32
    normal: Tensor = torch.erfinv(2.0 * uniform - 1.0) * 2.0**0.5
    return normal


@dataclass(frozen=True)
class RowsOf:
    """Which token, and which expert, each row of experts is of; `step`, `key` and `limits` are those of the layer."""

    key: tuple[int, int]
    step: int
    sample: Int64[Tensor, " r"]
    position: Int64[Tensor, " r"]
    expert: Int64[Tensor, " r"]
    first_feature: int
    width: int
    """Of all an expert's features, of which these may be a part."""
    limits: Limits

    def words(self, begin: int, end: int, features: int) -> Int64[Tensor, "r 1 f"]:
        """Return the 32 bits of each element of the rows from `begin` to `end`."""
        rows = slice(begin, end)
        place = self.sample[rows], self.position[rows], self.expert[rows] * -(-self.width // 4)
        return draw_row_words(self.key, self.step, place, self.first_feature, features)[:, None]


def dropout_of_rows(x: Float[Tensor, "r f"], p: float, rows: RowsOf) -> Float[Tensor, "r f"]:
    """Zero elements of experts' rows with probability `p` and divide the others by 1 - p; p is below 1."""
    scaled: Tensor = _scale(x[:, None], _dropping(p), rows)
    return scaled[:, 0]


@dataclass(frozen=True)
class _Place:
    """Where a tensor's elements stand in the run."""

    key: tuple[int, int]
    step: int
    sample: Int64[Tensor, " b"]
    position: Int64[Tensor, " s"]
    first_feature: int
    limits: Limits

    def words(self, begin: int, end: int, features: int) -> Int64[Tensor, "s b h"]:
        """Return the 32 bits of each element of the tokens from `begin` to `end`."""
        position = self.position[begin:end]
        return draw_words(self.key, self.step, self.sample, position, self.first_feature, features)


def _dropping(p: float) -> OfWords:
    threshold, scale = round(p * 2**32), 1.0 / (1.0 - p)

    def factors(words: Tensor, dtype: torch.dtype) -> Tensor:
        return (words >= threshold).to(dtype).mul_(scale)

    return factors


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _words_of_tokens(place: _Place, count: int) -> Tensor:
    return place.words(0, len(place.position), count)


def _place(where: Where, name: str, position: Tensor | None, first_feature: int) -> _Place:
    position = where.position if position is None else position
    key = stream_key(where.seed, where.draw_name(name))
    return _Place(key, where.step, where.sample, position, first_feature, where.limits)


def _scaled(x: Tensor, factors: OfWords, place: _Place) -> Tensor:
    assert x.shape[:2] == (len(place.position), len(place.sample)), "each token has its position and sample"
    return _scale(x, factors, place)


class _Scale(torch.autograd.Function):
    """x times factors that are made again for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: OfWords, place: _Place | RowsOf) -> Tensor:
        ctx.factors, ctx.place = factors, place
        return _times(x, factors, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _times(grads[0], ctx.factors, ctx.place), None, None


# torch 2.13's inductor makes C++ of Philox's shifts that no compiler takes.
_scale: Callable[..., Tensor] = torch.compiler.disable(_Scale.apply)  # type: ignore[no-untyped-call]


def _times(x: Tensor, factors: OfWords, place: _Place | RowsOf) -> Tensor:
    y, dtype = torch.empty_like(x), torch.promote_types(x.dtype, torch.float32)
    for begin, end in _pieces(x, place.limits.factors(x.device.type)):
        words = place.words(begin, end, x.shape[2])
        torch.mul(x[begin:end], factors(words, dtype), out=y[begin:end])  # rounds to x's type once
    return y


def _pieces(x: Tensor, limit: int) -> Iterator[tuple[int, int]]:
    """Yield stretches of tokens of at most so many elements, one position at least."""
    elements = max(1, x.shape[1] * x.shape[2])
    length = max(1, limit // elements)
    for begin in range(0, x.shape[0], length):
        yield begin, min(begin + length, x.shape[0])
