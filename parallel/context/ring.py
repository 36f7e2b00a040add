"""Ring attention: keys and values go around the context-parallel ranks, each rank's queries see all of them.

    step                0          1          2          3         cp = 4
    rank 0 has kv of    0          3          2          1
    rank 1              1          0          3          2         a block goes to the next rank at every step,
    rank 2              2          1          0          3         sent before the rank computes with its own copy
    rank 3              3          2          1          0

    forward    out, lse of each block's keys (kernels/attention/flash.py) are merged into the sums, in at least fp32
    backward   the blocks go around again; dk and dv of a block follow it one step behind, each rank adds its share,
               and after the last step they are sent once more, home

A block is the keys and the values, one after the other. What a rank's queries see nothing of, because it is later or
beyond the window, is passed on and not computed with.

Kept for the backward: q, k, v, the output and the log-sum-exp, s/cp rows each. Two blocks of keys and values are held
at a time (the backward: five, three of them gradients in at least fp32: the one at work, the one on its way from here
and the one on its way to here).
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from meshwright.kernels.attention.flash import Sight, merge_parts, partial_attention, partial_attention_gradients
from meshwright.kernels.attention.seen import CAUSAL, Seen
from meshwright.kernels.limits import USUAL
from meshwright.kernels.precision import at_least_fp32, autocast_inputs
from meshwright.parallel.collectives import Passing, pass_on
from meshwright.parallel.context.order import NO_DOCUMENTS, Documents, Pair, meetings, pairs, zigzag_part
from meshwright.parallel.mesh import Axis


class _Ring(NamedTuple):
    """What decides which keys a rank's queries see."""

    cp: Axis
    documents: Documents
    seen: Seen
    """Its bias without a gradient."""
    mask_entries: int

    def source(self, step: int) -> int:
        """Return whose keys and values this rank has at a step."""
        return (self.cp.rank - step) % self.cp.size

    def meeting(self, step: int, rows: int) -> list[tuple[Pair, Sight]]:
        """Return the pairs of a step, and what is seen within each."""
        source = self.source(step)
        found, sights = pairs(self.cp.rank, source, self.cp.size, rows, self.documents.meet, self.seen), []
        for pair in found:
            sight = Sight(pair.is_causal, mask_entries=self.mask_entries, scale=self.seen.scale)
            if pair.chunks is not None:
                first_query, first_key = (chunk * (rows // 2) for chunk in pair.chunks)
                sight = sight._replace(seen=self.seen, first_query=first_query, first_key=first_key)
            sights.append(sight)
        if any(pair.by_document for pair in found):
            whole = self.documents.of
            assert whole is not None, "there are pairs by document only where documents are given"
            mine, theirs = (zigzag_part(whole, replace(self.cp, rank=rank)) for rank in (self.cp.rank, source))
            for at, pair in enumerate(found):
                if pair.by_document:
                    sights[at] = sights[at]._replace(of_queries=mine[pair.queries], of_keys=theirs[pair.keys])
        return list(zip(found, sights, strict=True))


def ring_attention(
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
        ValueError: if this rank's positions are not two chunks, or `document` is not as long as the sample.
    """
    (rows, batch), document = q.shape[:2], documents.of
    if rows % 2 != 0:
        raise ValueError(
            f"{rows} positions on a rank are not two chunks; seq_len must divide by 2 * cp = {2 * cp.size}"
        )
    if document is not None and tuple(document.shape) != (rows * cp.size, batch):
        raise ValueError(
            f"document has shape {list(document.shape)}; it must be the whole sample's, {[rows * cp.size, batch]}"
        )
    if document is not None and documents.meet is None:
        documents = Documents(document, meetings(document, cp))
    q, k, v = autocast_inputs(q, k, v)
    bias = seen.bias
    ring = _Ring(cp, documents, seen if bias is None else seen._replace(bias=bias.detach()), mask_entries)
    mixed: Tensor = _RingAttention.apply(q, k, v, bias, ring)  # type: ignore[no-untyped-call]
    return mixed


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, ring: _Ring) -> Tensor:
        rows, wide = q.shape[0], at_least_fp32(q[:0]).dtype
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
        block = _block(k, v)
        for step in range(ring.cp.size):
            following = _send_unless_last(block, step, ring.cp)
            for pair, sight in ring.meeting(step, rows):
                at, (keys, values) = pair.queries, _keys_and_values(block, k, v, pair.keys)
                part = partial_attention(q[at], keys, values, sight)
                out[at], lse[at] = merge_parts(out[at], lse[at], *part)
                del keys, values, part  # a view of a block would hold it beside the next two
            block = following.wait()
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.ring = ring
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ring, grad, rows = ctx.ring, grads[0].contiguous(), q.shape[0]
        of_q, bias = torch.zeros_like(at_least_fp32(q)), ring.seen.bias
        of_bias = torch.zeros_like(at_least_fp32(bias)) if ctx.needs_input_grad[3] else None
        block = _block(k, v)
        behind: Passing | None = None  # the gradients of the block that this rank has, from those that had it before
        for step in range(ring.cp.size):
            following = _send_unless_last(block, step, ring.cp)
            of_block = torch.zeros_like(block, dtype=of_q.dtype)
            for pair, sight in ring.meeting(step, rows):
                at = pair.queries
                inputs = (grad[at], q[at], *_keys_and_values(block, k, v, pair.keys), out[at], lse[at])
                totals = (of_q[at], *_keys_and_values(of_block, k, v, pair.keys))
                _add_gradients(inputs, sight, totals, of_bias)
                del inputs, totals
            if behind is not None:
                of_block += behind.wait()
                behind = None  # its two blocks need not lie beside the next two
            behind = pass_on(of_block, ring.cp)
            block = following.wait()
        assert behind is not None, "an axis has at least one rank"
        of_k, of_v = _keys_and_values(behind.wait().to(k.dtype), k, v)
        if of_bias is not None:
            of_bias = of_bias.to(bias.dtype)
        return of_q.to(q.dtype), of_k, of_v, of_bias, None


def _block(k: Tensor, v: Tensor) -> Tensor:
    """Return keys and values, which may differ in width, as one row of numbers."""
    return torch.cat([k.flatten(), v.flatten()])


def _keys_and_values(block: Tensor, k: Tensor, v: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Return rows of the two in a block as views of it, in the shapes of k and v."""
    return block[: k.numel()].view(k.shape)[rows], block[k.numel() :].view(v.shape)[rows]


def _add_gradients(
    inputs: tuple[Tensor, ...], sight: Sight, totals: tuple[Tensor, Tensor, Tensor], of_bias: Tensor | None
) -> None:
    """Add a pair's gradients of q, k and v to the totals; no longer than that do they live."""
    grad, q, k, v, out, lse = inputs
    for total, some in zip(totals, partial_attention_gradients(grad, q, k, v, out, lse, sight, of_bias), strict=True):
        total += some


def _send_unless_last(block: Tensor, step: int, cp: Axis) -> Passing:
    """Send the block on before anything is computed with it; after the last step nobody needs it."""
    return pass_on(block, cp) if step < cp.size - 1 else Passing(block, block, [])
