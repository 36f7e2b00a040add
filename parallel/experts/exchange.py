"""Tokens to the ranks that hold their experts, and back: permute, exchange, restore.

Each token goes to k experts. Its k copies are sorted by expert; as a rank holds e/ep neighbouring experts, the
sorted rows are already grouped by destination. What arrives is grouped by source rank first, so it is sorted
by expert once more, and the experts see one stretch of rows each:

    x [t, h]  --sort-->  rows [t*k, h] by expert  --exchange-->  by (source, expert)  --sort-->  by expert
    y [t, h]  <--weighted sum of a token's k rows--  rows [t*k, h]  <--exchange--  <--unsort--

Where experts are also cut over etp, what arrived is shared among its ranks, padded to the largest number of rows:

    rows [r, h]  --share_rows-->  everyone's rows [R, h]  --experts-->  partial sums [R, h]  --return_rows-->  [r, h]

A choice may be dropped: it is sent nowhere, and a row of zeros comes back for it. Nothing is added by scatter: a
token's rows are gathered and summed in the order of its choices, so the result is bitwise the same at every run, on
every device. This file knows no router and no expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from meshwright.parallel.collectives import exchange_counts, exchange_rows, gather, scatter_sum
from meshwright.parallel.mesh import Axis


@dataclass(frozen=True)
class Dispatch:
    """What is needed to bring rows back: the two orders and how many rows went to and came from each rank."""

    order: Int64[Tensor, " sent"]
    """Which (token, choice) stands in each sorted row."""
    inverse: Int64[Tensor, " tk"]
    """In which sorted row each (token, choice) stands; of a dropped one, behind the last."""
    send: list[int]
    receive: list[int]
    arrival_order: Int64[Tensor, " r"] | None
    """For each row in expert order, the row in which it arrived; None where nothing was exchanged."""
    counts: Int64[Tensor, " e_local"]
    """How many rows each expert of this rank has."""


def dispatch(
    x: Shaped[Tensor, "t h"],
    expert: Int64[Tensor, "t k"],
    num_experts: int,
    ep: Axis,
    taken: Bool[Tensor, "t k"] | None = None,
) -> tuple[Shaped[Tensor, "r h"], Dispatch]:
    """Bring each token to its experts; return the rows of this rank's experts, sorted by expert.

    `taken` says which choices are sent at all; None is all of them.

    Raises:
        ValueError: if ep does not divide num_experts.
    """
    if num_experts % ep.size != 0:
        raise ValueError(f"num_experts = {num_experts} does not divide by {ep.name} = {ep.size}")
    top_k = expert.shape[1]
    chosen = (expert if taken is None else torch.where(taken, expert, num_experts)).flatten()
    order = torch.argsort(chosen, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    per_expert = torch.bincount(chosen, minlength=num_experts)[:num_experts]
    if taken is not None:
        order = order[: int(per_expert.sum())]  # the dropped ones were sorted behind all experts

    rows = _permute_copies(x, order, inverse, top_k)
    if not ep.is_split:
        return rows, Dispatch(order, inverse, [], [], None, per_expert)
    sent = per_expert.view(ep.size, num_experts // ep.size)
    arriving = exchange_counts(sent, ep)
    send, receive = sent.sum(1).tolist(), arriving.sum(1).tolist()
    rows = exchange_rows(rows, send, receive, ep)

    local_expert = torch.arange(arriving.shape[1], device=x.device).repeat(ep.size)
    arrival_order = torch.argsort(local_expert.repeat_interleave(arriving.flatten()), stable=True)
    rows = _permute_rows(rows, arrival_order)
    return rows, Dispatch(order, inverse, send, receive, arrival_order, arriving.sum(0))


def combine(rows: Float[Tensor, "r h"], weight: Float[Tensor, "t k"], plan: Dispatch, ep: Axis) -> Float[Tensor, "t h"]:
    """Bring the experts' rows back to their tokens; return each token's weighted sum."""
    if plan.arrival_order is not None:
        inverse = torch.empty_like(plan.arrival_order)
        inverse[plan.arrival_order] = torch.arange(inverse.numel(), device=inverse.device)
        rows = _permute_rows(rows, inverse)
        rows = exchange_rows(rows, plan.receive, plan.send, ep)
    summed: Tensor = _WeightedSum.apply(rows, weight, plan.order, plan.inverse)  # type: ignore[no-untyped-call]
    return summed


class AllToAll:
    """The exchange by an all-to-all with the sizes of the moment; `parallel/experts/deep_ep.py` has another."""

    def __init__(self, num_experts: int, ep: Axis) -> None:
        """Take the global number of experts and the axis over which they lie."""
        self.num_experts, self.ep = num_experts, ep

    def send(
        self,
        x: Shaped[Tensor, "t h"],
        expert: Int64[Tensor, "t k"],
        weight: Float[Tensor, "t k"],
        taken: Bool[Tensor, "t k"] | None = None,
    ) -> tuple[Shaped[Tensor, "r h"], Int64[Tensor, " e_local"], tuple[Dispatch, Tensor]]:
        """Bring each token to its experts; return this rank's rows by expert, how many each has, and the way back."""
        rows, plan = dispatch(x, expert, self.num_experts, self.ep, taken)
        return rows, plan.counts, (plan, weight)

    def bring_back(self, rows: Float[Tensor, "r h"], sent: tuple[Dispatch, Tensor]) -> Float[Tensor, "t h"]:
        """Return each token's weighted sum of its experts' rows."""
        plan, weight = sent
        return combine(rows, weight, plan, self.ep)


@dataclass(frozen=True)
class Shared:
    """The rows of all ranks of etp, sorted by expert, and how they lie in the exchanged, padded stretches."""

    rows: Shaped[Tensor, "R h"]
    counts: Int64[Tensor, " e_local"]
    place: Int64[Tensor, " R"] | None
    """Where each row stands among the etp stretches of `padded` rows each; None where nothing was shared."""
    own: int
    padded: int


def share_rows(rows: Shaped[Tensor, "r h"], counts: Int64[Tensor, " e_local"], etp: Axis) -> Shared:
    """Gather the rows of all ranks of etp, which are sorted by expert, and sort them all by expert."""
    own = rows.shape[0]
    if not etp.is_split:
        return Shared(rows, counts, None, own, own)
    of_ranks = gather(counts[None], etp)
    lengths = of_ranks.sum(1).tolist()
    padded = max(1, *lengths)
    everyone = gather(torch.nn.functional.pad(rows, (0, 0, 0, padded - own)), etp)
    expert = torch.arange(counts.shape[0], device=rows.device).repeat(etp.size).repeat_interleave(of_ranks.flatten())
    stands = [torch.arange(padded * rank, padded * rank + n, device=rows.device) for rank, n in enumerate(lengths)]
    place = torch.cat(stands)[torch.argsort(expert, stable=True)]
    return Shared(take_rows(everyone, place), of_ranks.sum(0), place, own, padded)


def return_rows(partial: Float[Tensor, "R h"], shared: Shared, etp: Axis) -> Float[Tensor, "r h"]:
    """Sum the ranks' partial rows and give each rank its own back, in the order in which it gave them."""
    if shared.place is None:
        return partial
    whole = put_rows(partial, shared.place, shared.padded * etp.size)
    # Not a view: FSDP2 hangs its hooks on the result, and a view could lose them.
    return scatter_sum(whole, etp)[: shared.own].clone()


def take_rows(x: Tensor, place: Tensor) -> Tensor:
    """Return rows place[i], each at most once; nothing but `place` is kept for the gradient."""
    taken: Tensor = _TakeRows.apply(x, place)  # type: ignore[no-untyped-call]
    return taken


def put_rows(x: Tensor, place: Tensor, size: int) -> Tensor:
    """Return `size` rows of which place[i] is row i and the others are zeros; nothing but `place` is kept."""
    put: Tensor = _PutRows.apply(x, place, size)  # type: ignore[no-untyped-call]
    return put


def _permute_copies(x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    permuted: Tensor = _PermuteCopies.apply(x, order, inverse, top_k)  # type: ignore[no-untyped-call]
    return permuted


def _rows_or_zeros(x: Tensor, row: Tensor) -> Tensor:
    """Return the named rows, and zeros for those behind the last."""
    if x.shape[0] == row.shape[0]:
        return x.index_select(0, row)
    return torch.cat((x, x.new_zeros(1, x.shape[1]))).index_select(0, row.clamp(max=x.shape[0]))


def _permute_rows(x: Tensor, order: Tensor) -> Tensor:
    permuted: Tensor = _PermuteRows.apply(x, order)  # type: ignore[no-untyped-call]
    return permuted


class _PermuteCopies(torch.autograd.Function):
    """Row i of the result is token order[i] // top_k; the gradient is gathered and summed, never scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x.index_select(0, torch.div(order, top_k, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        of_token = _rows_or_zeros(grads[0], inverse).view(-1, ctx.top_k, grads[0].shape[1])
        return of_token.sum(1), None, None, None


class _WeightedSum(torch.autograd.Function):
    """Each token's rows, weighted and summed in the order of its choices, of which a dropped one has zeros.

    Kept are the rows that there are, not one for each choice: where experts choose, most of a token's choices are none.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, order, inverse)
        of_token = _rows_or_zeros(rows, inverse).view(*weight.shape, rows.shape[1])
        return (of_token * weight[..., None].to(rows.dtype)).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, order, inverse = ctx.saved_tensors
        token = torch.div(order, weight.shape[1], rounding_mode="floor")
        of_row = grads[0].to(rows.dtype).index_select(0, token)
        of_weight = _rows_or_zeros((of_row * rows).sum(1, keepdim=True), inverse).view(weight.shape)
        of_rows = of_row.mul_(weight.flatten().index_select(0, order)[:, None].to(rows.dtype))
        return of_rows, of_weight.to(weight.dtype), None, None


class _PermuteRows(torch.autograd.Function):
    """Row i of the result is row order[i]; `order` is a permutation, so its inverse brings the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        return grads[0].index_select(0, inverse), None


class _TakeRows(torch.autograd.Function):
    """Row i of the result is row place[i], each at most once; rows that are not taken get the gradient zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.size = x.shape[0]
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return _put(grads[0], place, ctx.size), None


class _PutRows(torch.autograd.Function):
    """Row place[i] of the result is row i, the others are zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(place)
        return _put(x, place, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grads[0].index_select(0, place), None, None


def _put(x: Tensor, place: Tensor, size: int) -> Tensor:
    return x.new_zeros((size, *x.shape[1:])).index_copy_(0, place, x)
