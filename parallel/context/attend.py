"""Causal attention whose samples are spread over the context-parallel ranks, by either of two ways.

    ring       keys and values go around, cp - 1 times k/n of what q weighs; any number of heads
    ulysses    heads are exchanged for positions, twice, whatever cp; cp divides the heads of a rank

Both take and give this rank's positions (`order.py`); on one rank both are plain attention.
"""

from jaxtyping import Float, Int
from torch import Tensor

from meshwright.kernels.attention import attention
from meshwright.kernels.limits import USUAL
from meshwright.parallel.config import ContextWay
from meshwright.parallel.context.order import Meetings
from meshwright.parallel.context.ring import ring_attention
from meshwright.parallel.context.ulysses import ulysses_attention
from meshwright.parallel.mesh import Axis


def context_attention(
    q: Float[Tensor, "s_local b n d"],
    k: Float[Tensor, "s_local b k d"],
    v: Float[Tensor, "s_local b k d"],
    cp: Axis,
    way: ContextWay,
    document: Int[Tensor, "s b"] | None = None,
    meet: Meetings | None = None,
    mask_entries: int = USUAL.mask_entries,
) -> Float[Tensor, "s_local b n d"]:
    """Attend causally over whole samples, within a document where they are given for every position of the sample.

    `meet` is what `order.meetings` makes of the documents, where the caller has it already; the ring uses it.
    `mask_entries` is how many entries of a mask of documents are made at a time.

    Raises:
        ValueError: if the positions or heads of a rank do not divide as the way needs.
    """
    if not cp.is_split:
        return attention(q, k, v, is_causal=True, document=document, mask_entries=mask_entries)
    if way == "ring":
        return ring_attention(q, k, v, cp, document, meet, mask_entries)
    return ulysses_attention(q, k, v, cp, document, mask_entries)
