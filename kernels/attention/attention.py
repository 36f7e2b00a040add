"""Attention over sequence-first tensors: [s, b, heads, d] in, [s, b, heads, d] out.

torch's scaled_dot_product_attention, or our blocks of query rows where a CPU is faster with them (`choose.py`).
fp64 and GPUs always take the former. Documents that do not see each other go by the flash operators of `flash.py`,
which keep no mask [s, s] for the backward; where there is none, by a mask. Windows, blocks, biases of scores and
dropout of weights go by tiles of plain products (`tiles.py`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from meshwright.kernels.applied import applied
from meshwright.kernels.attention.blocks import block_attention
from meshwright.kernels.attention.flash import Sight, partial_attention, partial_attention_gradients, slower_than_flash
from meshwright.kernels.attention.seen import CAUSAL, Seen
from meshwright.kernels.choose import LONG, current
from meshwright.kernels.limits import USUAL
from meshwright.kernels.precision import at_least_fp32, autocast_inputs


def attention(
    q: Float[Tensor, "s b n d"],
    k: Float[Tensor, "s b k d"],
    v: Float[Tensor, "s b k e"],
    seen: Seen = CAUSAL,
    *,
    document: Int[Tensor, "s b"] | None = None,
    mask_entries: int = USUAL.mask_entries,
) -> Float[Tensor, "s b n e"]:
    """Average the values by the softmax of the scores; a token sees its own document only, when one is given.

    `mask_entries` is how many entries of a mask of documents, or scores of a tile, are made at a time.
    """
    q, k, v = autocast_inputs(q, k, v)
    way = _way(q)
    if way != "flash" and seen.is_plain:
        narrow = way == "blocks"
        mixed: Tensor = block_attention(q, k, v, document, is_causal=seen.is_causal, narrow=narrow, scale=seen.scale)
        return mixed
    has_flash = slower_than_flash(q.device, q.dtype, max(q.shape[3], v.shape[3])) is None
    if has_flash and q.device.type == "cuda" and v.shape[3] < q.shape[3] and seen.is_plain:
        wide = F.pad(v, (0, q.shape[3] - v.shape[3]))  # of one width, as the operators of CUDA want them
        mixed = attention(q, k, wide, seen, document=document, mask_entries=mask_entries)
        return mixed[..., : v.shape[3]]
    of_document = (document, document, mask_entries)
    if not seen.is_plain or q.shape[3] != v.shape[3]:
        return by_parts(q, k, v, seen.bias, Sight(seen.is_causal, *of_document, seen.scale, seen))  # type: ignore[no-any-return]
    if document is not None and has_flash:
        return by_parts(q, k, v, None, Sight(seen.is_causal, *of_document, seen.scale))  # type: ignore[no-any-return]
    mask = None
    if document is not None:
        mask = document.T[:, None, :, None] == document.T[:, None, None, :]
        if seen.is_causal:
            s = q.shape[0]
            mask = mask & torch.ones(s, s, dtype=torch.bool, device=q.device).tril()
    return _sdpa(q, k, v, mask, seen.is_causal and mask is None, seen.scale)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def by_parts(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sight: Sight) -> Tensor:
    """Attend to all keys as to one part of them (`flash.py`), keeping the log-sum-exp and no mask."""
    return applied(_ByParts, q, k, v, bias, sight)


class _ByParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sight: Sight) -> Tensor:
        if bias is not None:
            sight = sight._replace(seen=sight.seen._replace(bias=bias.detach()))
        out, lse = partial_attention(q, k, v, sight)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.sight = sight
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        bias = ctx.sight.seen.bias
        of_bias = torch.zeros_like(at_least_fp32(bias)) if ctx.needs_input_grad[3] else None
        of_q, of_k, of_v = partial_attention_gradients(grads[0], q, k, v, out, lse, ctx.sight, of_bias)
        of_bias = of_bias if of_bias is None else of_bias.to(bias.dtype)
        return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), of_bias, None


def cached_attention(
    q: Float[Tensor, "s b n d"],
    k: Float[Tensor, "c b k d"],
    v: Float[Tensor, "c b k e"],
    seen: Seen = CAUSAL,
    first_key: int = 0,
) -> Float[Tensor, "s b n e"]:
    """Attend where the s queries are the last s of c positions, the first of which is `first_key`.

    Other than `attention` to the whole it need not keep anything: a single query goes by one product with all keys.
    """
    q, k, v = autocast_inputs(q, k, v)
    s, c = q.shape[0], k.shape[0]
    if not q.numel():  # torch's own operator ends the process by a division by zero
        return q.new_empty(*q.shape[:3], v.shape[3])
    if s == c and first_key == 0:
        return attention(q, k, v, seen)
    if seen.is_plain and s > 1:
        visible = torch.ones(s, c, dtype=torch.bool, device=q.device).tril(diagonal=c - s)
        return _sdpa(q, k, v, visible, False, seen.scale)
    if s == 1 and seen.blocks is None and (not seen.window or c <= seen.window):
        bias = None
        if seen.bias is not None:  # the last key has distance 0
            bias = seen.bias[:, :c].flip(1)[None, :, None].to(q.dtype)
        return _sdpa(q, k, v, bias, False, seen.scale)
    sight = Sight(scale=seen.scale, seen=seen, first_query=first_key + c - s, first_key=first_key)
    mixed: Tensor = by_parts(q, k, v, seen.bias, sight)
    return mixed


def _way(q: Tensor) -> str:
    if q.device.type != "cpu":
        return "flash"
    chosen, is_long = current(), q.shape[0] >= LONG
    ways = {
        torch.float32: chosen.fp32_long_attention if is_long else chosen.fp32_attention,
        torch.bfloat16: chosen.bf16_long_attention if is_long else chosen.bf16_attention,
    }
    return ways.get(q.dtype, "flash")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None = None) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [b, heads, s, d]
    gqa = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    return y.permute(2, 0, 1, 3)
