"""Attention by exchanging heads for positions (Ulysses): each context-parallel rank sees whole samples, n/cp heads.

    q, k, v  [s/cp, b, n, d]  -- all-to-all ->  [s, b, n/cp, d]  -- attention ->  [s, b, n/cp, d]  -- all-to-all ->
    [s/cp, b, n, d]

Rank i gets the i-th n/cp query heads, and with them the key heads that they share. Key heads that cp does not divide
are repeated first, to the least common multiple: with n = 8, k = 2 and cp = 4 each twice,

    query heads   0 1 | 2 3 | 4 5 | 6 7        key heads   0 | 0 | 1 | 1

As k divides n, cp dividing n is all that is asked for.
"""

from collections.abc import Iterator
from math import lcm

import torch
from jaxtyping import Float
from torch import Tensor

from meshwright.kernels.attention.attention import attention
from meshwright.kernels.attention.seen import CAUSAL, Seen
from meshwright.kernels.limits import USUAL
from meshwright.kernels.precision import autocast_inputs
from meshwright.parallel.collectives import heads_to_sequence, sequence_to_heads
from meshwright.parallel.context.order import NO_DOCUMENTS, Documents, positions_to_ranks, ranks_to_positions
from meshwright.parallel.mesh import Axis


def ulysses_attention(
    q: Float[Tensor, "s_local b n d"],
    k: Float[Tensor, "s_local b k d"],
    v: Float[Tensor, "s_local b k e"],
    cp: Axis,
    documents: Documents = NO_DOCUMENTS,
    seen: Seen = CAUSAL,
    mask_entries: int = USUAL.mask_entries,
) -> Float[Tensor, "s_local b n e"]:
    """Attend over the whole sample from this rank's positions (`zigzag_positions`).

    Raises:
        ValueError: if cp does not divide the query heads.
    """
    n = q.shape[2]
    if n % cp.size != 0:
        raise ValueError(f"num_heads = {n} on a rank does not divide by cp = {cp.size}, as Ulysses attention needs")
    q, k, v = autocast_inputs(q, k, v)  # before they are sent: half the bytes
    # Only what comes back is kept: q, k and v as they were sent would lie beside it while attention is at work.
    mine = seen.of_heads(cp.rank * (n // cp.size), n // cp.size)
    q, k, v = _whole_samples(q, k, v, cp)
    mixed = attention(q, k, v, mine, document=documents.of, mask_entries=mask_entries)
    return heads_to_sequence(positions_to_ranks(mixed, cp), cp)


def _whole_samples(q: Tensor, k: Tensor, v: Tensor, cp: Axis) -> Iterator[Tensor]:
    """Return this rank's heads of all positions, in their order; one exchange for all three."""
    each = lcm(k.shape[2], cp.size) // k.shape[2]
    if each > 1:
        k, v = k.repeat_interleave(each, dim=2), v.repeat_interleave(each, dim=2)
    parts = [torch.unflatten(x, 2, (cp.size, -1)).flatten(3) for x in (q, k, v)]
    together = torch.cat(parts, dim=3)  # rank by rank its q, k and v heads, [s/cp, b, cp, features]
    whole = ranks_to_positions(sequence_to_heads(together, cp), cp)[:, :, 0]
    split = torch.split(whole, [part.shape[3] for part in parts], dim=2)
    for x, like in zip(split, (q, k, v), strict=True):
        yield torch.unflatten(x, 2, (-1, like.shape[3]))
