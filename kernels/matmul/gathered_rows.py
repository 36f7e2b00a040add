"""Products of experts with rows that are looked up, each token several times: the rows are made, used, and let go.

    x [t, i]    token [r], sorted by expert: whose row each is      y [r, o] = grouped_linear(x[token], weight, counts)

Kept for the backward are x and the indices, not the r rows of x, which are made again: r is t times the choices of a
token, and a row of x is wide. The gradient of x sums each token's rows in a fixed order: `place[t, c]` says where in r
the c-th of a token's rows stands.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from meshwright.kernels.matmul.grouped import grouped_product, grouped_product_gradients
from meshwright.kernels.matmul.linear import uses_own_products
from meshwright.kernels.precision import autocast_inputs, result_dtype


@torch.compiler.disable  # type: ignore[untyped-decorator]
def grouped_linear_of_gathered(
    x: Float[Tensor, "t i"],
    weight: Float[Tensor, "e o i"],
    token: Int64[Tensor, " r"],
    place: Int64[Tensor, "t c"],
    counts: Int64[Tensor, " e"],
) -> Float[Tensor, "r o"]:
    """Multiply the rows of these tokens, sorted by expert, counts[e] of them each, with their expert's weight."""
    y: Tensor = _Gathered.apply(x, weight, token, place, counts)  # type: ignore[no-untyped-call]
    return y


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, token: Tensor, place: Tensor, counts: Tensor) -> Tensor:
        dtype = result_dtype(x)
        ctx.types = x.dtype, weight.dtype
        ctx.widen = dtype == torch.bfloat16 and uses_own_products(x, dtype)
        if not ctx.widen:
            x, weight = autocast_inputs(x, weight)
        ctx.save_for_backward(x, weight, token, place, counts)
        y: Tensor = grouped_product(x[token], weight, counts, dtype, ctx.widen)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, token, place, counts = ctx.saved_tensors
        of_rows, of_weight = grouped_product_gradients(grads[0].contiguous(), x[token], weight, counts, ctx.widen)
        of_x = of_rows[place.flatten()].view(*place.shape, -1).sum(1)
        return of_x.to(ctx.types[0]), of_weight.to(ctx.types[1]), None, None, None
