"""Products with a weight matrix: x W^T + bias, forward and backward.

On a GPU, and on a CPU where PyTorch's own way was chosen, this is `F.linear`. Otherwise the three products of
forward and backward go as `choose.py` says, each by itself:

    fp32                    by MKL or oneDNN
    bf16, chosen `fp32`     x, weight and gradient widened, multiplied in fp32, rounded to bf16 once

In the second case autocast's fp32 weights are used as they are, unrounded: nothing is cast, and the result is at least
as exact as the product of rounded weights. x and weight are saved for the backward as they came, never their copies.
This file knows tensors; it knows no layer and no rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from meshwright.kernels.applied import applied
from meshwright.kernels.choose import current
from meshwright.kernels.matmul import products
from meshwright.kernels.precision import at_least_fp32, result_dtype


def linear(
    x: Float[Tensor, "*tokens i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*tokens o"]:
    """Return x W^T + bias, in autocast's dtype where that is on, else in x's.

    Raises:
        ValueError: if x and weight have other numbers of features; PyTorch's own way raises a RuntimeError.
    """
    dtype = result_dtype(x)
    if not uses_own_products(x, dtype):
        return F.linear(x, weight, bias)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)} times weight {list(weight.shape)}: their last dims must be the same")
    if (inferred := products.inferred_output(x, weight, bias)) is not None:
        return inferred
    return applied(_Linear, x, weight, bias, dtype)


def uses_own_products(x: Tensor, dtype: torch.dtype) -> bool:
    """Say whether products with results in `dtype` go another way than PyTorch's own."""
    if x.device.type != "cpu":
        return False
    chosen = current()
    if dtype == torch.bfloat16:
        return chosen.bf16_products == "fp32"
    by = (chosen.fp32_output, chosen.fp32_input_gradient, chosen.fp32_weight_gradient)
    return dtype == torch.float32 and by != ("mkl", "mkl", "mkl")


class _Linear(torch.autograd.Function):
    """x W^T + bias with the products of `products.py`; the result comes in `dtype`, gradients in their inputs'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
        y = products.output(at_least_fp32(rows), at_least_fp32(weight))
        if bias is not None:
            y = y + bias  # not in place: selective recompute may have kept the product
        return y.to(dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad = at_least_fp32(grads[0]).reshape(-1, weight.shape[0])
        of_x = of_weight = of_bias = None
        if needs_x:
            of_x = products.input_gradient(grad, at_least_fp32(weight)).to(x.dtype).view(x.shape)
        if needs_weight:
            of_weight = products.weight_gradient(grad, at_least_fp32(x).reshape(-1, x.shape[-1])).to(weight.dtype)
        if needs_bias:
            of_bias = grad.sum(0).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias, None
