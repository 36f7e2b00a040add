"""Attention to a part of the keys, with the log-sum-exp that lets the parts be put together.

    out [s, b, n, d]   the average over the keys that were given      lse [s, b, n]   log of the sum of exp(scores)

    merge_parts    lse = log(exp(lse1) + exp(lse2))      out = out1 exp(lse1 - lse) + out2 exp(lse2 - lse)
    gradients      P = exp(scores - lse) with the log-sum-exp, and the output, of *all* keys: a part's dq, dk and dv
                   are then parts of the whole gradient, which simply add up

A row that sees none of the keys has out = 0 and lse = -inf, so that it weighs nothing in the merge. PyTorch's CPU
operator says lse = 0 for such a row, a weight of 1: it is mended here.

    CPU                 torch's flash operator; what may be seen by document is a mask, made for slabs of query rows
    CUDA, fp16, bf16    torch's flash operator, by pieces of documents (`flash_cuda.py`), as it takes no mask
    other               plain products, `reference.py`; `slower_than_flash` says why
    windows, biases     and whatever else these operators do not take: tiles of plain products (`tiles.py`)

Keys and values with fewer heads than the queries (GQA) are never repeated.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meshwright.kernels import reference
from meshwright.kernels.attention import flash_cuda
from meshwright.kernels.attention.seen import EVERYTHING, Seen
from meshwright.kernels.attention.tiles import Span, tiled_attention, tiled_gradients
from meshwright.kernels.limits import USUAL
from meshwright.kernels.precision import at_least_fp32

CUDA_DTYPES, CUDA_WIDTH = (torch.float16, torch.bfloat16), 256
"""What the operator of CUDA takes, and how wide a head may be for it."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Sight(NamedTuple):
    """Which of the keys each query may see."""

    is_causal: bool = False
    """Query i sees keys 0 to i only; there are as many keys as queries."""
    of_queries: Int[Tensor, "s b"] | None = None
    """Documents of the queries; None: they see every key's."""
    of_keys: Int[Tensor, "c b"] | None = None
    """Documents of the keys."""
    mask_entries: int = USUAL.mask_entries
    """How many entries of a mask are made at a time."""
    scale: float | None = None
    """What the products of queries and keys are multiplied by; None: 1 / sqrt(d)."""
    seen: Seen = EVERYTHING
    """What else decides, by positions: no operator of torch's takes it."""
    first_query: int = 0
    first_key: int = 0
    """Positions in the sample; only `seen` asks for them."""

    def span(self) -> Span:
        """Return this as tiles of plain products take it."""
        seen = self.seen
        if seen.is_plain:
            seen = Seen(is_causal=self.is_causal)
        seen = seen._replace(scale=self.scale)
        return Span(seen, self.first_query, self.first_key, self.of_queries, self.of_keys, self.mask_entries)

    def mask(self, rows: slice, keys: slice) -> Bool[Tensor, "b s c"] | None:
        """Say for some of the queries and keys what is seen; None: all of it."""
        if self.of_queries is None or self.of_keys is None:
            return None
        seen = self.of_queries[rows].T[:, :, None] == self.of_keys[keys].T[:, None, :]
        if self.is_causal:
            ids = torch.arange(len(self.of_queries), device=seen.device)
            seen &= ids[rows, None] >= ids[None, keys]
        return seen


def slower_than_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why attention by parts, or within documents, cannot go by a flash operator here; None if it does."""
    if device.type == "cpu" or (device.type == "cuda" and dtype in CUDA_DTYPES and head_dim <= CUDA_WIDTH):
        return None
    takes = f"takes fp16 and bf16, heads of at most {CUDA_WIDTH}" if device.type == "cuda" else "does not exist there"
    what = f"{str(dtype).removeprefix('torch.')}, heads of {head_dim}"
    return f"({what}) on {device.type}: the flash operator {takes}"


def by_tiles(q: Tensor, v: Tensor, sight: Sight) -> bool:
    """Say whether this goes by tiles of plain products, because no operator of torch's takes it."""
    return not sight.seen.is_plain or q.shape[3] != v.shape[3]


def partial_attention(
    q: Float[Tensor, "s b n d"], k: Float[Tensor, "c b k d"], v: Float[Tensor, "c b k e"], sight: Sight
) -> tuple[Float[Tensor, "s b n e"], Float[Tensor, "s b n"]]:
    """Average the values over the keys that are seen, and return the log-sum-exp of the scores with it."""
    if by_tiles(q, v, sight):
        return tiled_attention(q, k, v, sight.span())
    if slower_than_flash(q.device, q.dtype, q.shape[3]) is not None:
        return reference.partial_attention(q, k, v, _whole_mask(q, k, sight), sight.scale)
    if q.device.type == "cuda":
        return flash_cuda.forward(q, k, v, (sight.is_causal, sight.of_queries, sight.of_keys), sight.scale)
    if sight.of_queries is None:
        out, lse = _forward(_heads(q), _heads(k), _heads(v), 0.0, sight.is_causal, scale=sight.scale)
        return _sequence(out), lse.permute(2, 0, 1)
    out, lse = torch.zeros_like(q), at_least_fp32(q[..., 0]).new_full(q.shape[:3], -torch.inf)
    for rows, keys, seen in _slabs(q, k, sight):
        bias = _bias(seen, q.dtype)
        heads = (_heads(q[rows]), _heads(k[keys]), _heads(v[keys]))
        some, some_lse = _forward(*heads, 0.0, False, attn_mask=bias, scale=sight.scale)
        out[rows] = _sequence(some)
        lse[rows] = some_lse.permute(2, 0, 1).masked_fill(_blind(seen), -torch.inf)
    return out, lse


def partial_attention_gradients(
    grad: Float[Tensor, "s b n e"],
    q: Float[Tensor, "s b n d"],
    k: Float[Tensor, "c b k d"],
    v: Float[Tensor, "c b k e"],
    out: Float[Tensor, "s b n e"],
    lse: Float[Tensor, "s b n"],
    sight: Sight,
    of_bias: Float[Tensor, "n distances"] | None = None,
) -> tuple[Float[Tensor, "s b n d"], Float[Tensor, "c b k d"], Float[Tensor, "c b k e"]]:
    """Return what these keys and values add to the gradients of q, k and v; `out` and `lse` are those of all keys.

    What they add to the gradient of the scores' bias is added to `of_bias`.
    """
    if by_tiles(q, v, sight):
        return tiled_gradients(grad, q, k, v, (out, lse), sight.span(), of_bias)
    if slower_than_flash(q.device, q.dtype, q.shape[3]) is not None:
        given = (_whole_mask(q, k, sight), sight.scale)
        return reference.partial_attention_gradients(grad, q, k, v, (out, lse), *given)
    if q.device.type == "cuda":
        by = (sight.is_causal, sight.of_queries, sight.of_keys)
        return flash_cuda.backward(grad, q, k, v, (out, lse), by, sight.scale)
    if sight.of_queries is None:
        heads = [_heads(x) for x in (grad, q, k, v, out, lse)]
        of_q, of_k, of_v = (_sequence(x) for x in _backward(*heads, 0.0, sight.is_causal, scale=sight.scale))
        return of_q, of_k, of_v
    of_q, of_k, of_v = (torch.zeros_like(at_least_fp32(x)) for x in (q, k, v))
    for rows, keys, seen in _slabs(q, k, sight):
        heads = [_heads(x) for x in (grad[rows], q[rows], k[keys], v[keys], out[rows], lse[rows])]
        some = _backward(*heads, 0.0, False, attn_mask=_bias(seen, q.dtype), scale=sight.scale)
        of_q[rows] = _sequence(some[0])
        of_k[keys] += _sequence(some[1])
        of_v[keys] += _sequence(some[2])
    return of_q, of_k, of_v


def merge_parts(
    out: Float[Tensor, "s b n d"],
    lse: Float[Tensor, "s b n"],
    more: Float[Tensor, "s b n d"],
    more_lse: Float[Tensor, "s b n"],
) -> tuple[Float[Tensor, "s b n d"], Float[Tensor, "s b n"]]:
    """Put the averages over two parts of the keys together, in the dtype of `lse`; -inf and -inf stay -inf."""
    total = torch.logaddexp(lse, more_lse)
    anchor = total.masked_fill(total == -torch.inf, 0.0)  # -inf - -inf would be no number
    merged = out * (lse - anchor).exp()[..., None] + more * (more_lse - anchor).exp()[..., None]
    return merged, total


def _slabs(q: Tensor, k: Tensor, sight: Sight) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield query rows, the keys before their end, and what they see of them, where they see anything."""
    s, c, b = q.shape[0], k.shape[0], q.shape[1]
    size = max(1, sight.mask_entries // (b * c))
    for begin in range(0, s, size):
        rows = slice(begin, min(begin + size, s))
        keys = slice(0, rows.stop if sight.is_causal else c)
        seen = sight.mask(rows, keys)
        assert seen is not None, "slabs are for a sight by documents"
        if bool(seen.any()):
            yield rows, keys, seen


def _whole_mask(q: Tensor, k: Tensor, sight: Sight) -> Tensor:
    s, c = q.shape[0], k.shape[0]
    seen = sight.mask(slice(0, s), slice(0, c))
    if seen is None:
        seen = torch.ones(1, s, c, dtype=torch.bool, device=q.device)
        seen = seen.tril() if sight.is_causal else seen
    return seen


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a key is seen, -inf elsewhere, [b, 1, s, c]; the operator misreads any dtype but that of q."""
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
    return bias[:, None]


def _blind(seen: Tensor) -> Tensor:
    """Say which queries see no key: [b, s, c] -> [s, b, 1]."""
    return ~seen.any(2).T[:, :, None]


def _heads(x: Tensor) -> Tensor:
    """[s, b, n, ...] -> [b, n, s, ...], a view."""
    return x.movedim(0, 2)


def _sequence(x: Tensor) -> Tensor:
    """[b, n, s, d] -> [s, b, n, d], a view."""
    return x.movedim(2, 0)
