"""The exchange of tokens by DeepEP, where it is installed: kernels over NVLink and RDMA instead of an all-to-all.

A token is sent once to each rank that has one of its experts, however many it has there, and comes back once:

    x [t, h] --DeepEP dispatch--> tokens of all ranks [R, h] --sort--> rows by expert --experts--> --sum--> [R, h]
    y [t, h] <--DeepEP combine, which adds up the ranks' sums-------------------------------------------- [R, h]

The backward of its dispatch is its combine, and the other way round. Written against `deep_ep.ElasticBuffer` (DeepEP 2;
https://github.com/deepseek-ai/DeepEP, README, "Example use in model training"). It moves bf16 and needs Hopper GPUs.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from meshwright.parallel.experts.exchange import Dispatch, combine, dispatch
from meshwright.parallel.mesh import NO_EP, Axis


def why_not(device: torch.device) -> str:
    """Say why DeepEP cannot be used here; "" if it can."""
    if device.type != "cuda":
        return f"DeepEP runs on NVIDIA GPUs, and this rank is on {device.type}"
    if importlib.util.find_spec("deep_ep") is None:
        return "the package deep_ep is not installed"
    try:
        found = importlib.import_module("deep_ep")
    except Exception as error:  # a build for another torch or CUDA fails in its own ways
        return f"the package deep_ep is there and cannot be loaded: {error}"
    return "" if hasattr(found, "ElasticBuffer") else "the package deep_ep is older than 2: it has no ElasticBuffer"


@dataclass(frozen=True)
class Sent:
    """What is needed to bring the experts' rows back."""

    handle: Any
    """DeepEP's own."""
    local: Dispatch
    """From received tokens to rows by expert."""
    weight: Float[Tensor, "R k"]
    """Of each received token's choices; of those that are another rank's, anything."""


class DeepEpExchange:
    """Brings tokens to their experts and back over `ep`, by DeepEP."""

    def __init__(self, num_experts: int, ep: Axis, dtype: torch.dtype = torch.bfloat16) -> None:
        """Take the global number of experts; buffers are made when the first tokens come. DeepEP moves bf16 only."""
        self.num_experts, self.ep, self.dtype = num_experts, ep, dtype
        self._buffer: Any = None
        self._room = 0

    def send(
        self,
        x: Float[Tensor, "t h"],
        expert: Int64[Tensor, "t k"],
        weight: Float[Tensor, "t k"],
        taken: Bool[Tensor, "t k"] | None = None,
    ) -> tuple[Float[Tensor, "r h"], Int64[Tensor, " e_local"], Sent]:
        """Bring each token to its experts; return this rank's rows by expert, how many each has, and the way back."""
        chosen = expert if taken is None else torch.where(taken, expert, -1)
        buffer = self._buffer_for(x, chosen.shape[1])
        found = _Received()
        tokens, weights = _Dispatch.apply(  # type: ignore[no-untyped-call]
            x.to(self.dtype), weight.to(torch.float32), chosen, buffer, self.num_experts, self._room, found
        )
        e_local = self.num_experts // self.ep.size
        # Whether experts are numbered here or globally, the remainder is their number here.
        is_here = found.expert >= 0
        rows, local = dispatch(tokens, found.expert.long().clamp(min=0) % e_local, e_local, NO_EP, is_here)
        return rows, local.counts, Sent(found.handle, local, weights)

    def bring_back(self, rows: Float[Tensor, "r h"], sent: Sent) -> Float[Tensor, "t h"]:
        """Return each token's weighted sum of its experts' rows."""
        of_token = combine(rows, sent.weight, sent.local, NO_EP)
        summed: Tensor = _Combine.apply(of_token.to(self.dtype), sent.handle, self._buffer)  # type: ignore[no-untyped-call]
        return summed

    def _buffer_for(self, x: Tensor, top_k: int) -> Any:
        """Return a buffer with room for so many tokens of each rank; a larger one where more come than before."""
        if self._buffer is None or x.shape[0] > self._room:
            self._room = x.shape[0]
            make = importlib.import_module("deep_ep").ElasticBuffer
            self._buffer = make(self.ep.group, num_max_tokens_per_rank=self._room, hidden=x.shape[1], num_topk=top_k)
        return self._buffer


class _Received:
    """What DeepEP's dispatch says beside tensors that have a gradient."""

    handle: Any
    expert: Tensor


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, chosen: Tensor, buffer: Any, num_experts: int, room: int, found: _Received
    ) -> tuple[Tensor, Tensor]:
        tokens, expert, weights, handle, _ = buffer.dispatch(
            x.contiguous(),
            topk_idx=chosen,
            topk_weights=weight.contiguous(),
            num_experts=num_experts,
            num_max_tokens_per_rank=room,
        )
        count = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        ctx.buffer, ctx.handle = buffer, handle
        found.handle, found.expert = handle, expert[:count]
        return tokens[:count].clone(), weights[:count].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_weight, _ = ctx.buffer.combine(
            grads[0].contiguous(), handle=ctx.handle, topk_weights=grads[1].contiguous()
        )
        return of_x, of_weight, None, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, handle: Any, buffer: Any) -> Tensor:
        ctx.handle, ctx.buffer, ctx.count = handle, buffer, rows.shape[0]
        combined: Tensor = buffer.combine(rows.contiguous(), handle=handle)[0]
        return combined

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        of_rows: Tensor = ctx.buffer.dispatch(grads[0].contiguous(), handle=ctx.handle)[0]
        return of_rows[: ctx.count], None, None
