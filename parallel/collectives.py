"""Every collective that moves tensors, in one place: with gradients (layers) and without (state).

    gather           x [s/n, ...] on each rank      ->  [s, ...]              backward: reduce-scatter
    scatter_sum      x [s, ...], a part of a sum    ->  [s/n, ...]            backward: all-gather
    sum_over_ranks   x on each rank                 ->  the sum               backward: the sum of the gradients
    exchange_rows    x [sum(send), h] on each rank  ->  [sum(receive), h]     rows by destination, by source
    reduce_scatter   [n * part] on each rank        ->  [part]                the sum of everyone's piece for me
    all_gather       [part] on each rank            ->  [n * part]            everyone's piece, in axis order
    pass_on          x on rank r                    ->  x of rank r - 1       one step around the ring
    sequence_to_heads    [s/n, b, heads, d]         ->  [s, b, heads/n, d]    and `heads_to_sequence` back

The communication stands where it is called; an axis of size 1 communicates nothing. Names of torch's
collectives that differ between the versions we support (2.11 to 2.13) are resolved here and nowhere else.

On a CPU a reduce-scatter is an all-to-all of the pieces, which are then added up: gloo's own is an all-reduce of a
copy, which takes 1.4 to 3 times as long (docs/measured/layouts.md). The pieces are added in one order on every rank, in
fp32 at least, and rounded once; until they are waited for they take as much memory as what was sent.
"""

from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from meshwright.parallel.mesh import Axis

# torch 2.13 renamed both and warns at the old names; 2.11 knows only the old ones.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@runtime_checkable
class Pending(Protocol):
    """A collective under way: what torch's asynchronous calls return."""

    def wait(self) -> Any:
        """Return when the result is there."""


class _Done:
    def wait(self) -> None:
        """Return at once: nothing was communicated."""


DONE = _Done()


def all_reduce(x: Tensor, axis: Axis, *, asynchronous: bool = False) -> Pending:
    """Sum `x` over the axis, in place."""
    if not axis.is_split:
        return DONE
    return dist.all_reduce(x, group=axis.group, async_op=asynchronous) or DONE


def all_reduce_max(x: Tensor, axis: Axis) -> None:
    """Take the largest of the ranks' values, element by element, in place."""
    if axis.is_split:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=axis.group)


def reduce_scatter(out: Shaped[Tensor, " part"], x: Shaped[Tensor, " n_part"], axis: Axis) -> Pending:
    """Give each rank along the axis the sum of everyone's piece for it; asynchronous."""
    if not axis.is_split:
        out.copy_(x)
        return DONE
    return start_reduce_scatter(out, x, axis.group)


def start_reduce_scatter(out: Tensor, x: Tensor, group: dist.ProcessGroup | None) -> Pending:
    """Begin `reduce_scatter` within a group; x must live and not be written to until the result was waited for."""
    if x.device.type == "cpu":
        return _exchange_pieces(out, x, group)
    return _reduce_scatter_flat(out, x, group=group, async_op=True) or DONE


def _exchange_pieces(out: Tensor, x: Tensor, group: dist.ProcessGroup | None) -> Pending:
    assert out.dtype == x.dtype, f"the sum of {x.dtype} is {x.dtype}, not {out.dtype}"
    ranks = dist.get_world_size(group)
    assert ranks * out.numel() == x.numel(), f"{x.numel()} numbers are no {ranks} pieces of {out.numel()}"
    pieces = torch.empty_like(x)
    work = dist.all_to_all_single(pieces, x, group=group, async_op=True)
    return _SumOfPieces(out.view(-1), pieces.view(ranks, out.numel()), work)


class _SumOfPieces:
    """What every rank sent for this one, on its way; the sum is made when it is waited for."""

    def __init__(self, out: Tensor, pieces: Tensor, work: Any) -> None:
        self._out, self._work = out, work
        self._pieces: Tensor | None = pieces

    def wait(self) -> None:
        """Wait for the pieces, the first time, add them up and let go of them."""
        if self._pieces is None:
            return
        self._work.wait()
        with torch.no_grad():
            torch.sum(self._pieces, 0, out=self._out)
        self._pieces = None


def all_gather(out: Shaped[Tensor, " n_part"], x: Shaped[Tensor, " part"], axis: Axis) -> Pending:
    """Give every rank along the axis everyone's piece, in axis order; asynchronous."""
    if not axis.is_split:
        out.copy_(x)
        return DONE
    return _all_gather_flat(out, x, group=axis.group, async_op=True) or DONE


def gather(x: Shaped[Tensor, "s_local *rest"], axis: Axis) -> Shaped[Tensor, "s *rest"]:
    """Put every rank's rows after each other, in axis order; each rank's gradient is a part of the sum."""
    if not axis.is_split:
        return x
    gathered: Tensor = _Gather.apply(x, axis)  # type: ignore[no-untyped-call]
    return gathered


def scatter_sum(x: Shaped[Tensor, "s *rest"], axis: Axis) -> Shaped[Tensor, "s_local *rest"]:
    """Sum the ranks' `x` and give each its stretch of rows, in axis order."""
    if not axis.is_split:
        return x
    scattered: Tensor = _ScatterSum.apply(x, axis)  # type: ignore[no-untyped-call]
    return scattered


def sum_over_ranks(x: Shaped[Tensor, "*any"], axis: Axis) -> Shaped[Tensor, "*any"]:
    """Sum the ranks' `x`, for each of them; each rank's gradient is a part of the sum."""
    if not axis.is_split:
        return x
    summed: Tensor = _SumOverRanks.apply(x, axis)  # type: ignore[no-untyped-call]
    return summed


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _summed(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.axis), None


def _summed(x: Tensor, axis: Axis) -> Tensor:
    whole = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole, group=axis.group)
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return gather_rows(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return scatter_sum_of_rows(grads[0], ctx.axis), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return scatter_sum_of_rows(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather_rows(grads[0], ctx.axis), None


def gather_rows(x: Shaped[Tensor, "s_local *rest"], axis: Axis) -> Shaped[Tensor, "s *rest"]:
    """Put every rank's rows after each other, in axis order; nothing is recorded for a gradient."""
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    _all_gather_flat(out, x.contiguous(), group=axis.group)
    return out


def scatter_sum_of_rows(x: Shaped[Tensor, "s *rest"], axis: Axis) -> Shaped[Tensor, "s_local *rest"]:
    """Sum the ranks' `x` and give each its stretch of rows, in axis order; nothing is recorded for a gradient."""
    out, pending = start_scatter_sum_of_rows(x, axis)
    pending.wait()
    return out


def start_gather_rows(x: Tensor, axis: Axis) -> tuple[Tensor, Pending]:
    """Begin `gather_rows`; its result may be read once the second has been waited for."""
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    return out, all_gather(out.flatten(), x.contiguous().flatten(), axis)


def start_scatter_sum_of_rows(x: Tensor, axis: Axis) -> tuple[Tensor, Pending]:
    """Begin `scatter_sum_of_rows`; until the second has been waited for, `x` must live and not be written to."""
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    return out, reduce_scatter(out.flatten(), x.contiguous().flatten(), axis)


def exchange_counts(counts: Shaped[Tensor, "n *rest"], axis: Axis) -> Shaped[Tensor, "n *rest"]:
    """Send row i to rank i of the axis; return the rows that the ranks sent here, in axis order."""
    if not axis.is_split:
        return counts
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=axis.group)
    return received


def exchange_rows(
    x: Shaped[Tensor, "sent h"], send: list[int], receive: list[int], axis: Axis
) -> Shaped[Tensor, "received h"]:
    """Send the first send[0] rows to rank 0 of the axis, the next send[1] to rank 1, ...; differentiable."""
    if not axis.is_split:
        return x
    exchanged: Tensor = _ExchangeRows.apply(x, send, receive, axis)  # type: ignore[no-untyped-call]
    return exchanged


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], axis: Axis) -> Tensor:
        ctx.send, ctx.receive, ctx.axis = send, receive, axis
        return _all_to_all(x, send, receive, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.receive, ctx.send, ctx.axis), None, None, None


def _all_to_all(x: Tensor, send: list[int], receive: list[int], axis: Axis) -> Tensor:
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=axis.group)
    return out


class Passing:
    """A tensor on its way to the next rank of a ring, and that of the rank before on its way here."""

    def __init__(self, sent: Tensor, received: Tensor, works: list[Any]) -> None:
        """Keep what is sent alive until it has left."""
        self._sent, self._received, self._works = sent, received, works

    def wait(self) -> Tensor:
        """Return what the rank before sent."""
        for work in self._works:
            work.wait()
        return self._received


def pass_on(x: Tensor, axis: Axis) -> Passing:
    """Send `x` to the next rank of the axis, the last to the first; asynchronous, `x` must not be written to."""
    if not axis.is_split:
        return Passing(x, x, [])
    sent, received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    to, source = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    send = dist.P2POp(dist.isend, sent, group=axis.group, group_peer=to)
    receive = dist.P2POp(dist.irecv, received, group=axis.group, group_peer=source)
    return Passing(sent, received, dist.batch_isend_irecv([send, receive]))


def sequence_to_heads(x: Shaped[Tensor, "s_local b n d"], axis: Axis) -> Shaped[Tensor, "s b n_local d"]:
    """Exchange a part of the sequence, all heads, for everyone's part, n/size heads; rows in axis order."""
    if not axis.is_split:
        return x
    exchanged: Tensor = _SequenceToHeads.apply(x, axis)  # type: ignore[no-untyped-call]
    return exchanged


def heads_to_sequence(x: Shaped[Tensor, "s b n_local d"], axis: Axis) -> Shaped[Tensor, "s_local b n d"]:
    """Exchange back what `sequence_to_heads` did."""
    if not axis.is_split:
        return x
    exchanged: Tensor = _HeadsToSequence.apply(x, axis)  # type: ignore[no-untyped-call]
    return exchanged


class _SequenceToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _to_heads(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _to_sequence(grads[0], ctx.axis), None


class _HeadsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _to_sequence(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _to_heads(grads[0], ctx.axis), None


def _to_heads(x: Tensor, axis: Axis) -> Tensor:
    sent = (
        torch.unflatten(x, 2, (axis.size, -1)).movedim(2, 0).contiguous()
    )  # [size, s_local, b, n_local, d], by destination
    out = torch.empty_like(sent)
    dist.all_to_all_single(out, sent, group=axis.group)
    return out.flatten(0, 1)


def _to_sequence(x: Tensor, axis: Axis) -> Tensor:
    sent = torch.unflatten(x.contiguous(), 0, (axis.size, -1))
    out = torch.empty_like(sent)
    dist.all_to_all_single(out, sent, group=axis.group)
    return out.movedim(0, 2).flatten(2, 3)
