"""Attention whose samples are spread over the context-parallel ranks, by either of two ways.

    ring       keys and values go around, cp - 1 times k/n of what q weighs; any number of heads
    ulysses    heads are exchanged for positions, twice, whatever cp; cp divides the heads of a rank

Both take and give this rank's positions (`order.py`); on one rank both are plain attention. What is seen
(`kernels/attention/seen.py`) is told in positions of the whole sample and in heads of this rank.
"""

from jaxtyping import Float
from torch import Tensor

from meshwright.kernels.attention.attention import attention
from meshwright.kernels.attention.seen import CAUSAL, Seen
from meshwright.kernels.limits import USUAL
from meshwright.parallel.config import ContextWay
from meshwright.parallel.context.order import NO_DOCUMENTS, Documents
from meshwright.parallel.context.ring import ring_attention
from meshwright.parallel.context.ulysses import ulysses_attention
from meshwright.parallel.mesh import Axis


def context_attention(
    q: Float[Tensor, "s_local b n d"],
    k: Float[Tensor, "s_local b k d"],
    v: Float[Tensor, "s_local b k e"],
    cp: Axis,
    way: ContextWay,
    documents: Documents = NO_DOCUMENTS,
    seen: Seen = CAUSAL,
    mask_entries: int = USUAL.mask_entries,
) -> Float[Tensor, "s_local b n e"]:
    """Attend over whole samples, within a document where they are given for every position of the sample.

    `mask_entries` is how many entries of a mask of documents are made at a time.

    Raises:
        ValueError: if the positions or heads of a rank do not divide as the way needs, or attention is block-sparse.
    """
    if not cp.is_split:
        return attention(q, k, v, seen, document=documents.of, mask_entries=mask_entries)
    if seen.blocks is not None:
        raise ValueError(f"block-sparse attention does not go over cp = {cp.size}; cp = 1, or a window, would fit")
    if way == "ring":
        return ring_attention(q, k, v, cp, documents, seen, mask_entries)
    return ulysses_attention(q, k, v, cp, documents, seen, mask_entries)
