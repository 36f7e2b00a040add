"""Which positions of a sample each context-parallel rank holds, and which chunks have to meet.

A sample is cut in 2 * cp chunks; rank r holds chunks r and 2*cp - 1 - r, in this order. With cp = 4:

    chunk   0  1  2  3  4  5  6  7          rank 0: 0 7    rank 1: 1 6    rank 2: 2 5    rank 3: 3 4
    rank    0  1  2  3  3  2  1  0

Causal attention lets chunk i see the chunks up to i: rank r's two see (r + 1) + (2*cp - r) chunks, the same number on
every rank. Blocks of neighbouring positions would give the last rank 2*cp - 1 times the work of the first.

What else is seen (a window, keys to both sides) is decided chunk by chunk. Of causal attention to all, keys that come
from rank `source` meet a rank's queries as whole rectangles (c: causal, all: every key):

    source = rank      queries  low high      source < rank             source > rank
              keys low   c     all            all   all                  -    all
              keys high  -      c              -     -                   -    all
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from meshwright.kernels.attention.seen import CAUSAL, Seen
from meshwright.parallel.mesh import Axis

Meeting = Literal["none", "some", "all"]
"""How much of a chunk's keys its queries may see on account of their documents."""
Meetings = tuple[tuple[Meeting, ...], ...]
"""By the queries' chunk, then by the keys'."""


class Documents(NamedTuple):
    """Which documents the tokens of a batch belong to, where each is attended to alone."""

    of: Int[Tensor, "s b"] | None = None
    """By position, of whole samples; None: all of a sample is one document."""
    meet: Meetings | None = None
    """What `meetings` makes of it, where the caller has it already; the ring uses it."""


NO_DOCUMENTS = Documents()


class Pair(NamedTuple):
    """Local rows of queries and of keys that meet."""

    queries: slice
    keys: slice
    is_causal: bool
    by_document: bool
    """Whether some of the keys belong to other documents."""
    chunks: tuple[int, int] | None = None
    """Those of the queries and of the keys, where what is seen depends on the positions within them."""


def chunks_of(rank: int, cp: int) -> tuple[int, int]:
    """Return the two chunks that a rank holds, the lower first."""
    return rank, 2 * cp - 1 - rank


def zigzag_positions(seq_len: int, cp: Axis) -> Int[Tensor, " s_local"]:
    """Return the positions that this rank holds, ascending: two chunks of seq_len / (2 * cp).

    Raises:
        ValueError: if the chunks do not divide the sequence.
    """
    return zigzag_part(torch.arange(seq_len), cp)


def zigzag_part(x: Shaped[Tensor, "s *rest"], cp: Axis) -> Shaped[Tensor, "s_local *rest"]:
    """Return this rank's rows of a whole sample's, which stand in the order of positions.

    Raises:
        ValueError: if the chunks do not divide the rows.
    """
    if not cp.is_split:
        return x
    if x.shape[0] % (2 * cp.size) != 0:
        raise ValueError(f"seq_len = {x.shape[0]} does not divide by 2 * cp = {2 * cp.size}")
    chunks = x.chunk(2 * cp.size)
    return torch.cat([chunks[at] for at in chunks_of(cp.rank, cp.size)])


def ranks_to_positions(x: Shaped[Tensor, "s *rest"], cp: Axis) -> Shaped[Tensor, "s *rest"]:
    """Put rows that stand rank after rank in the order of positions."""
    chunks = x.chunk(2 * cp.size)
    held = [chunk for rank in range(cp.size) for chunk in chunks_of(rank, cp.size)]
    return torch.cat([chunks[held.index(chunk)] for chunk in range(2 * cp.size)])


def positions_to_ranks(x: Shaped[Tensor, "s *rest"], cp: Axis) -> Shaped[Tensor, "s *rest"]:
    """Put rows that stand in the order of positions rank after rank."""
    chunks = x.chunk(2 * cp.size)
    return torch.cat([chunks[chunk] for rank in range(cp.size) for chunk in chunks_of(rank, cp.size)])


def meetings(document: Int[Tensor, "s b"], cp: Axis) -> Meetings:
    """Say for each two chunks of a whole sample whether documents of theirs meet, in any sample of the batch.

    Every rank knows every position's document, so nothing is communicated. Chunks meet where the ranges of their ids
    overlap: exact where ids ascend along a sample, as they do in a store, and otherwise at worst too careful.
    """
    chunks = torch.unflatten(document, 0, (2 * cp.size, -1))
    low, high = chunks.amin(1), chunks.amax(1)  # [chunks, b]
    meet = ((low[:, None] <= high[None]) & (low[None] <= high[:, None])).any(2)
    same = ((low[:, None] == high[None]) & (low[None] == high[:, None])).all(2)
    words: list[Meeting] = ["none", "some", "all"]
    return tuple(tuple(words[number] for number in row) for row in (meet.int() + (meet & same).int()).tolist())


def pairs(rank: int, source: int, cp: int, rows: int, meet: Meetings | None, seen: Seen = CAUSAL) -> list[Pair]:
    """Return what a rank's queries have to see of the keys of `source`, `rows` of each; leave out what they need not.

    Without documents causal attention to all is one rectangle; else the chunks are looked at one by one.
    """
    low, high, both = slice(0, rows // 2), slice(rows // 2, rows), slice(0, rows)
    if not (seen.is_plain and seen.is_causal):
        return _pairs_by_place(rank, source, cp, rows // 2, meet, seen)
    if meet is None:
        if source == rank:
            return [Pair(both, both, is_causal=True, by_document=False)]
        return [Pair(both, low, False, False) if source < rank else Pair(high, both, False, False)]
    found = []
    for queries, mine in zip((low, high), chunks_of(rank, cp), strict=True):
        for keys, theirs in zip((low, high), chunks_of(source, cp), strict=True):
            if theirs <= mine and meet[mine][theirs] != "none":
                found.append(Pair(queries, keys, theirs == mine, meet[mine][theirs] == "some"))
    return found


def _pairs_by_place(rank: int, source: int, cp: int, chunk: int, meet: Meetings | None, seen: Seen) -> list[Pair]:
    """Return the pairs of chunks of which something is seen, and whether their positions are needed to know what."""
    found, rows = [], (slice(0, chunk), slice(chunk, 2 * chunk))
    for queries, mine in zip(rows, chunks_of(rank, cp), strict=True):
        for keys, theirs in zip(rows, chunks_of(source, cp), strict=True):
            of_mine, of_theirs = (range(at * chunk, (at + 1) * chunk) for at in (mine, theirs))
            met: Meeting = "all" if meet is None else meet[mine][theirs]
            if met == "none" or not seen.key_ranges(of_mine, of_theirs):
                continue
            is_causal = seen.is_causal and mine == theirs
            reach = seen._replace(is_causal=False) if is_causal else seen
            by_place = seen.bias is not None or seen.drop is not None or not reach.sees_all(of_mine, of_theirs)
            found.append(Pair(queries, keys, is_causal, met == "some", (mine, theirs) if by_place else None))
    return found
