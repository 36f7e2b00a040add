"""Attention over sequence-first tensors: [s, b, heads, d] in, [s, b, heads, d] out.

torch's scaled_dot_product_attention, or our blocks of query rows where a CPU is faster with them (`choose.py`).
fp64 and GPUs always take the former. Documents that do not see each other go by the flash operators of `flash.py`,
which keep no mask [s, s] for the backward; where there is none, by a mask.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from meshwright.kernels.attention_blocks import block_attention
from meshwright.kernels.choose import current
from meshwright.kernels.flash import Sight, partial_attention, partial_attention_gradients, slower_than_flash
from meshwright.kernels.limits import USUAL
from meshwright.kernels.precision import autocast_inputs


def attention(
    q: Float[Tensor, "s b n d"],
    k: Float[Tensor, "s b k d"],
    v: Float[Tensor, "s b k d"],
    *,
    is_causal: bool = True,
    document: Int[Tensor, "s b"] | None = None,
    mask_entries: int = USUAL.mask_entries,
) -> Float[Tensor, "s b n d"]:
    """Average the values by the softmax of q k / sqrt(d); a token sees its own document only, when one is given.

    `mask_entries` is how many entries of a mask of documents `flash.py` makes at a time.
    """
    q, k, v = autocast_inputs(q, k, v)
    way = _way(q)
    if way != "flash":
        return block_attention(q, k, v, document, is_causal=is_causal, narrow=way == "blocks")
    mask = None
    if document is not None and slower_than_flash(q.device, q.dtype, q.shape[3]) is None:
        attended: Tensor = within_documents(q, k, v, Sight(is_causal, document, document, mask_entries))
        return attended
    if document is not None:
        mask = document.T[:, None, :, None] == document.T[:, None, None, :]
        if is_causal:
            s = q.shape[0]
            mask = mask & torch.ones(s, s, dtype=torch.bool, device=q.device).tril()
    return _sdpa(q, k, v, mask, is_causal and mask is None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def within_documents(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """Attend by a flash operator to the tokens of the own document."""
    attended: Tensor = _WithinDocuments.apply(q, k, v, sight)  # type: ignore[no-untyped-call]
    return attended


class _WithinDocuments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
        out, lse = partial_attention(q, k, v, sight)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.sight = sight
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        of_q, of_k, of_v = partial_attention_gradients(grads[0], q, k, v, out, lse, ctx.sight)
        return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), None


def cached_attention(
    q: Float[Tensor, "s b n d"], k: Float[Tensor, "c b k d"], v: Float[Tensor, "c b k d"]
) -> Float[Tensor, "s b n d"]:
    """Attend causally where the s queries are the last s of c positions."""
    q, k, v = autocast_inputs(q, k, v)
    s, c = q.shape[0], k.shape[0]
    if s == 1:
        return _sdpa(q, k, v, None, is_causal=False)
    seen = torch.ones(s, c, dtype=torch.bool, device=q.device).tril(diagonal=c - s)
    return _sdpa(q, k, v, seen, is_causal=False)


def _way(q: Tensor) -> str:
    if q.device.type != "cpu":
        return "flash"
    ways = {torch.float32: current().fp32_attention, torch.bfloat16: current().bf16_attention}
    return ways.get(q.dtype, "flash")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [b, heads, s, d]
    gqa = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa)
    return y.permute(2, 0, 1, 3)
