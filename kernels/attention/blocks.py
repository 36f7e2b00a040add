"""Causal attention by blocks of query rows, forward and backward, from PyTorch's batched products.

The scores of all rows never exist together, and what a block need not see is not computed:

    keys      0    64   128  192  256
    block 0   [   \\]                     a block of 64 query rows multiplies with the keys up to its own end;
    block 1   [        \\]                only the last 64 columns hold a mask (\\)
    block 2   [             \\]
    block 3   [                  \\]

    forward   S = scale Q K^T     P = softmax(S)     O = P V
    backward  S and P once more,  dV += P^T dO       dP = dO V^T     dS = P (dP - rowsum(P dP))
              dQ = scale dS K     dK += scale dS^T Q

Nothing but q, k and v is kept for the backward: torch's softmax and its gradient are one pass each over scores that
are still in the cache, so neither a log-sum-exp nor the output is needed. Heads go by in groups whose scores fit the
cache, and all tiles use the same memory for them: fresh memory costs as much as the softmax.

The heads of a group that share one key head (GQA) stand beside each other as rows, position by position:
q [s, b, k*r, d] -> [b*k, s*r, d]; row i is position i // r. With r = 1 that is a view.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meshwright.kernels.precision import at_least_fp32, without_autocast

BLOCK = 64
"""Positions of a block of query rows."""
SCORES = 1 << 21
"""Scores held at a time: 8 MiB of fp32."""


def block_attention(
    q: Float[Tensor, "s b n d"],
    k: Float[Tensor, "s b k d"],
    v: Float[Tensor, "s b k e"],
    document: Int[Tensor, "s b"] | None = None,
    *,
    is_causal: bool = True,
    narrow: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "s b n e"]:
    """Attend as `attention` does; everything is computed in at least fp32.

    `narrow` makes the products after the softmax in the inputs' dtype, where that multiplies faster.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    y: Tensor = attention_by_blocks(q, k, v, document, is_causal, narrow, scale)
    return y


@torch.library.custom_op("meshwright::attention_by_blocks", mutates_args=())
def attention_by_blocks(
    q: Tensor, k: Tensor, v: Tensor, document: Tensor | None, is_causal: bool, narrow: bool, scale: float
) -> Tensor:
    """Compute the output, tile by tile."""
    problem = _Problem(q, k, v, document, is_causal, narrow, scale)
    out, room = problem.empty_rows(v), problem.room()
    with without_autocast(q):
        for tile in problem.tiles():
            p = problem.probabilities(tile, room)
            out[tile.heads, tile.rows] = torch.bmm(p, problem.v[tile.heads, : tile.seen])
    return problem.restore(out, q, v)


@torch.library.custom_op("meshwright::attention_by_blocks_gradients", mutates_args=())
def attention_by_blocks_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, document: Tensor | None, is_causal: bool, narrow: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v, tile by tile."""
    problem = _Problem(q, k, v, document, is_causal, narrow, scale)
    grad = problem.as_rows(grad.to(problem.v.dtype))
    of_q, room, more_room = problem.empty_rows(q), problem.room(), problem.room(problem.v.dtype)
    sums = problem.v.new_empty(problem.group * problem.s * max(k.shape[3], v.shape[3]))
    of_k, of_v = (problem.wide_k.new_zeros(x.shape) for x in (problem.k, problem.v))
    with without_autocast(q):
        for tile in problem.tiles():
            p, g = problem.probabilities(tile, room), grad[tile.heads, tile.rows]
            keys, values = problem.k[tile.heads, : tile.seen], problem.v[tile.heads, : tile.seen]
            of_v[tile.heads, : tile.seen] += _product(p.transpose(1, 2), g, sums)
            d = torch.bmm(g, values.transpose(1, 2), out=_part(more_room, p.shape))
            # In place: each row is summed before it is written.
            d = torch.ops.aten._softmax_backward_data.out(d, p, 2, p.dtype, grad_input=d)
            of_q[tile.heads, tile.rows] = torch.bmm(d, keys).mul_(problem.scale)
            of_k[tile.heads, : tile.seen] += _product(d.transpose(1, 2), problem.q[tile.heads, tile.rows], sums)
    of_k.mul_(problem.scale)
    return problem.restore(of_q, q, q), problem.restore(of_k, k, k), problem.restore(of_v, v, v)


@attention_by_blocks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, document: Tensor | None, is_causal: bool, narrow: bool, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@attention_by_blocks_gradients.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, document: Tensor | None, is_causal: bool, narrow: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, document, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, document)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, document = ctx.saved_tensors
    of_q, of_k, of_v = attention_by_blocks_gradients(grad, q, k, v, document, *ctx.how)
    return of_q, of_k, of_v, None, None, None, None


attention_by_blocks.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True)
class _Tile:
    """A block of query rows of some heads, and the keys that it sees."""

    heads: slice
    begin: int
    end: int
    """Positions of the queries."""
    seen: int
    """Keys 0 to seen-1 are visible to some row."""
    rows: slice
    """The rows of the queries: r for each position."""


class _Problem:
    """The inputs as batches of matrices, [b*k, s*r, d] and [b*k, s, d], and the probabilities of a tile."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, document: Tensor | None, *how: Any) -> None:
        is_causal, narrow, scale = how
        self.s, self.b, self.num_kv_heads = k.shape[:3]
        self.shared = q.shape[2] // self.num_kv_heads  # r: query heads on one key head
        self.scale = scale
        self.document, self.is_causal = document, is_causal
        self.wide_q, self.wide_k = self.as_rows(at_least_fp32(q)), self.as_rows(at_least_fp32(k))
        if narrow:
            self.q, self.k, self.v = self.as_rows(q), self.as_rows(k), self.as_rows(v)
        else:
            self.q, self.k, self.v = self.wide_q, self.wide_k, self.as_rows(at_least_fp32(v))
        hidden = torch.full((BLOCK, BLOCK), -torch.inf, dtype=self.wide_q.dtype, device=q.device)
        self.future = hidden.triu_(1)  # added to the scores of a block's own positions
        heads = self.b * self.num_kv_heads
        self.group = max(1, min(heads, SCORES // (min(BLOCK, self.s) * self.shared * self.s)))

    def as_rows(self, x: Tensor) -> Tensor:
        """[s, b, k*r, d] -> [b*k, s*r, d]; a view where r is 1."""
        r, d = x.shape[2] // self.num_kv_heads, x.shape[3]
        if r == 1:
            return x.reshape(self.s, self.b * self.num_kv_heads, d).transpose(0, 1)
        grouped = x.reshape(self.s, self.b, self.num_kv_heads, r, d).permute(1, 2, 0, 3, 4)
        return grouped.reshape(self.b * self.num_kv_heads, self.s * r, d)

    def empty_rows(self, wide_as: Tensor) -> Tensor:
        """Return room for a result with q's heads and that width, laid out so that `restore` need not copy."""
        shape = (self.s, self.b, self.num_kv_heads * self.shared, wide_as.shape[3])
        return self.as_rows(self.wide_q.new_empty(shape))

    def restore(self, rows: Tensor, like: Tensor, wide_as: Tensor) -> Tensor:
        """[b*k, s*r, d] -> [s, b, k*r, d], in the dtype of `like`; contiguous, as torch.compile is told."""
        d = wide_as.shape[3]
        grouped = rows.view(self.b, self.num_kv_heads, self.s, -1, d).permute(2, 0, 1, 3, 4)
        return grouped.to(like.dtype).reshape(*like.shape[:3], d).contiguous()

    def room(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return room for the scores of the largest tile."""
        size = self.group * min(BLOCK, self.s) * self.shared * self.s
        return torch.empty(size, dtype=dtype or self.wide_q.dtype, device=self.wide_q.device)

    def tiles(self) -> list[_Tile]:
        """Cut the queries in blocks, and the heads in groups whose scores fit the cache."""
        r, tiles = self.shared, []
        for first in range(0, self.b * self.num_kv_heads, self.group):
            for begin in range(0, self.s, BLOCK):
                end = min(begin + BLOCK, self.s)
                seen = end if self.is_causal else self.s
                tiles.append(_Tile(slice(first, first + self.group), begin, end, seen, slice(begin * r, end * r)))
        return tiles

    def probabilities(self, tile: _Tile, room: Tensor) -> Tensor:
        """Return softmax(scale q k^T) of a tile, in `room` where the products that follow have its dtype."""
        q, k = self.wide_q[tile.heads, tile.rows], self.wide_k[tile.heads, : tile.seen].transpose(1, 2)
        scores = _part(room, (*q.shape[:2], tile.seen))
        scores = torch.baddbmm(scores, q, k, beta=0, alpha=self.scale, out=scores)
        if self.document is not None:
            scores.masked_fill_(self._foreign(tile, self.document), -torch.inf)
        if self.is_causal:
            size = tile.end - tile.begin
            own = scores[:, :, tile.begin :].view(-1, size, self.shared, size)
            own += self.future[:size, None, :size]
        # In place: each row is read before it is written.
        return torch.softmax(scores, 2, out=scores).to(self.v.dtype)

    def _foreign(self, tile: _Tile, document: Tensor) -> Tensor:
        """Say for each row and key of a tile whether they are of different documents: [heads, rows, seen]."""
        of_row = document[tile.begin : tile.end].repeat_interleave(self.shared, 0).T
        sample = torch.arange(self.b, device=document.device).repeat_interleave(self.num_kv_heads)[tile.heads]
        return of_row[sample, :, None] != document[: tile.seen].T[sample, None, :]


def _part(room: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the beginning of `room` as a tensor of this shape."""
    return room[: prod(shape)].view(shape)


def _product(a: Tensor, b: Tensor, room: Tensor) -> Tensor:
    """Return a b in `room`. torch's batched product wants a contiguous result; added to a slice it goes one by one."""
    return torch.bmm(a, b, out=_part(room, (a.shape[0], a.shape[1], b.shape[2])))
