"""Tokens to the ranks that hold their experts, and back: permute, exchange, restore.

Each token goes to k experts. Its k copies are sorted by expert; as a rank holds e/ep neighbouring experts, the
sorted rows are already grouped by destination. What arrives is grouped by source rank first, so it is sorted
by expert once more, and the experts see one stretch of rows each:

    x [t, h]  --sort-->  rows [t*k, h] by expert  --exchange-->  by (source, expert)  --sort-->  by expert
    y [t, h]  <--weighted sum of a token's k rows--  rows [t*k, h]  <--exchange--  <--unsort--

Nothing is added by scatter: a token's rows are gathered and summed in the order of its choices, so the result
is bitwise the same at every run, on every device. This file knows no router and no expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from meshwright.parallel.collectives import exchange_counts, exchange_rows
from meshwright.parallel.mesh import Axis


@dataclass(frozen=True)
class Dispatch:
    """What is needed to bring rows back: the two orders and how many rows went to and came from each rank."""

    order: Int64[Tensor, " tk"]
    """Which (token, choice) stands in each sorted row."""
    inverse: Int64[Tensor, " tk"]
    """In which sorted row each (token, choice) stands."""
    send: list[int]
    receive: list[int]
    arrival_order: Int64[Tensor, " r"] | None
    """For each row in expert order, the row in which it arrived; None where nothing was exchanged."""
    counts: Int64[Tensor, " e_local"]
    """How many rows each expert of this rank has."""


def dispatch(
    x: Float[Tensor, "t h"], expert: Int64[Tensor, "t k"], num_experts: int, ep: Axis
) -> tuple[Float[Tensor, "r h"], Dispatch]:
    """Bring each token to its experts; return the rows of this rank's experts, sorted by expert.

    Raises:
        ValueError: if ep does not divide num_experts.
    """
    if num_experts % ep.size != 0:
        raise ValueError(f"num_experts = {num_experts} does not divide by {ep.name} = {ep.size}")
    top_k = expert.shape[1]
    order = torch.argsort(expert.flatten(), stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    per_expert = torch.bincount(expert.flatten(), minlength=num_experts)

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
    of_token = _permute_rows(rows, plan.inverse).view(*weight.shape, rows.shape[1])
    return (of_token * weight[..., None].to(of_token.dtype)).sum(1)


def _permute_copies(x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    permuted: Tensor = _PermuteCopies.apply(x, order, inverse, top_k)  # type: ignore[no-untyped-call]
    return permuted


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
        of_token = grads[0].index_select(0, inverse).view(-1, ctx.top_k, grads[0].shape[1])
        return of_token.sum(1), None, None, None


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
