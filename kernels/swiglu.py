"""The gated unit silu(gate) * up; silu is computed again in the backward instead of kept."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def swiglu(gate: Float[Tensor, "*tokens f"], up: Float[Tensor, "*tokens f"]) -> Float[Tensor, "*tokens f"]:
    """Return silu(gate) * up in gate's dtype."""
    y: Tensor = _SwiGlu.apply(gate, up)  # type: ignore[no-untyped-call]
    return y


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return of_gate, F.silu(gate).mul_(grads[0])
