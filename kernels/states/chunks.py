"""How a long recurrence is cut in chunks, and which tokens of a chunk still see each other past a document's start.

A chunk of l tokens takes a state in and gives one out. Where a document starts, what was before is forgotten: the
token there begins from zero. With one start in a chunk, at token 2 (B):

    begins    . . B . .      seen   i\\j 0 1 2 3 4     from_before   1 1 0 0 0    tokens that still see the state before
    segment   0 0 1 1 1       0      1               reaches_end   0 0 1 1 1    tokens that the state after still holds
                              1      1 1             untouched     0            whether the state before reaches the end
                              2      . . 1
                              3      . . 1 1
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Stretch(NamedTuple):
    """Some chunks of one length, next to each other."""

    begin: int
    """The first token."""
    chunks: int
    """How many chunks."""
    length: int
    """Tokens of each."""

    @property
    def tokens(self) -> slice:
        """Return the tokens of all its chunks."""
        return slice(self.begin, self.begin + self.chunks * self.length)


def stretches(seq_len: int, chunk_size: int, at_once: int = 1) -> list[Stretch]:
    """Cut a sequence in chunks, at most `at_once` of them in a stretch; what remains at the end is a short one.

    Raises:
        ValueError: if the size of a chunk is not positive.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size} must be at least 1")
    return list(_stretches(seq_len, chunk_size, at_once))


def _stretches(seq_len: int, chunk_size: int, at_once: int) -> Iterator[Stretch]:
    whole = seq_len // chunk_size
    for first in range(0, whole, at_once):
        yield Stretch(first * chunk_size, min(at_once, whole - first), chunk_size)
    if seq_len % chunk_size:
        yield Stretch(whole * chunk_size, 1, seq_len % chunk_size)


class Sight(NamedTuple):
    """What the tokens of chunks see, as factors of 0 and 1."""

    seen: Float[Tensor, "*batch l l"]
    """Whether token i sees token j: j is not later, and no document starts after j up to i."""
    from_before: Float[Tensor, "*batch l"]
    reaches_end: Float[Tensor, "*batch l"]
    untouched: Float[Tensor, "*batch"]


def sight(begins: Bool[Tensor, "l *batch"], dtype: torch.dtype) -> Sight:
    """Return what the tokens of chunks see whose documents begin at `begins`."""
    segment = segments(begins).movedim(0, -1)
    seen = (segment[..., :, None] == segment[..., None, :]).tril()
    return Sight(
        seen.to(dtype),
        (segment == 0).to(dtype),
        (segment == segment[..., -1:]).to(dtype),
        (segment[..., -1] == 0).to(dtype),
    )


def segments(begins: Bool[Tensor, "s *batch"]) -> Int[Tensor, "s *batch"]:
    """Return how many documents have started up to each token, itself included."""
    return begins.cumsum(0, dtype=torch.int32)
