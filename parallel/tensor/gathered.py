"""Products of rows that are spread over the tensor-parallel axis, with their communication beside the arithmetic.

    forward     x [s/tp, b, i]   --all-gather-->  [s, b, i]  --W_1 ... W_n-->  y_k [s, b, o_k/tp]
    backward    all-gather of x starts        | grad = sum g_k W_k   [s, b, i], a part of the sum over tp
                reduce-scatter of grad starts | W_k's gradient = g_k^T x
                                              | wait: x's gradient   [s/tp, b, i]

Kept for the backward are x's own rows; the gathered ones are let go and gathered again, as sequence parallelism is
meant (Korthikanti et al. 2022, section 4.2.2). The gradients of x and of the weights are nodes of their own, so that
the second is made while the first is on its way, and a schedule that splits the backward pass computes each once:
autograd takes the node that was made last first, which puts the weights' before whatever waits for x's.

    y = _InputSide(_Awaited(x), _WeightSide(whole, W))         backward: _InputSide, _WeightSide, _Awaited

This file knows tensors and an axis; it knows no layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from meshwright.kernels.matmul import products
from meshwright.kernels.matmul.linear import linear, uses_own_products
from meshwright.kernels.precision import at_least_fp32, result_dtype
from meshwright.parallel.collectives import DONE, Pending, gather_rows, start_gather_rows, start_scatter_sum_of_rows
from meshwright.parallel.mesh import Axis


class Matrix(NamedTuple):
    """What rows are multiplied by."""

    weight: Float[Tensor, "o_local i"]
    bias: Float[Tensor, " o_local"] | None = None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def products_of_gathered(
    x: Float[Tensor, "s_local *rest i"], matrices: Sequence[Matrix], axis: Axis
) -> list[Float[Tensor, "s *rest o_local"]]:
    """Multiply everyone's rows, in axis order, by each matrix; x's gradient is summed over the axis."""
    dtype = result_dtype(x)
    own_way = uses_own_products(x, dtype)
    underway = _Underway(own_way)
    awaited = _Awaited.apply(x, underway)  # type: ignore[no-untyped-call]
    # Rounded before they are sent: fewer bytes, the same products. Our own take the rows as they are.
    rows = x.detach() if own_way else x.detach().to(dtype)
    whole = gather_rows(rows, axis)
    given = [tensor for matrix in matrices for tensor in matrix]
    results = _WeightSide.apply(underway, whole, *given)  # type: ignore[no-untyped-call]
    back = _Back(axis, underway, tuple(matrix.weight for matrix in matrices), rows)
    return list(_InputSide.apply(awaited, back, *results))  # type: ignore[no-untyped-call]


class _Underway:
    """What the nodes of one call have on its way in the backward pass."""

    def __init__(self, own_way: bool) -> None:
        self.own_way = own_way
        self.whole: Tensor | None = None
        self.gathering: Pending = DONE
        self.grad: Tensor | None = None
        self.scattering: Pending = DONE

    def multiplied(self, x: Tensor) -> Tensor:
        """Return x as the products take it: our own are made in at least fp32, of what came as it came."""
        return at_least_fp32(x) if self.own_way else x


class _Back(NamedTuple):
    """What the input's side needs that has no gradient there."""

    axis: Axis
    underway: _Underway
    weights: tuple[Tensor, ...]
    rows: Tensor


class _Awaited(torch.autograd.Function):
    """The rows as they are; their gradient is waited for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, underway: _Underway) -> Tensor:
        ctx.underway = underway
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.underway.scattering.wait()
        ctx.underway.scattering, ctx.underway.grad = DONE, None
        return grads[0], None


class _WeightSide(torch.autograd.Function):
    """The products; backward, the gradients of weights and biases."""

    @staticmethod
    def forward(ctx: Any, underway: _Underway, whole: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
        ctx.underway = underway
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in given]
        pairs = zip(given[::2], given[1::2], strict=True)
        return tuple(linear(whole, weight, bias) for weight, bias in pairs if weight is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        underway: _Underway = ctx.underway
        underway.gathering.wait()
        assert underway.whole is not None, "the input's side comes first and gathers"
        whole = underway.multiplied(underway.whole.flatten(0, -2))
        found: list[Tensor | None] = [None, None]
        for at, grad in enumerate(grads):
            of_weight, of_bias = ctx.needs_input_grad[2 + 2 * at : 4 + 2 * at]
            rows = grad.flatten(0, -2)
            for_weight, for_bias = ctx.dtypes[2 * at : 2 * at + 2]
            wide = rows.to(whole.dtype)
            found.append(products.weight_gradient(wide, whole).to(for_weight) if of_weight else None)
            found.append(at_least_fp32(rows).sum(0).to(for_bias) if of_bias else None)
        underway.whole, underway.gathering = None, DONE
        return tuple(found)


class _InputSide(torch.autograd.Function):
    """The results as they are; backward, the gradient of the rows, and what the weights' side needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, back: _Back, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(back.rows, *back.weights)
        ctx.axis, ctx.underway, ctx.dtype = back.axis, back.underway, x.dtype
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        axis, underway = ctx.axis, ctx.underway
        dtype = underway.multiplied(rows[:0]).dtype
        if any(_is_wanted(ctx, 1 + at) for at in range(len(grads))):
            underway.whole, underway.gathering = start_gather_rows(rows, axis)
        if not _is_wanted(ctx, 0):
            return None, None, *grads
        total: Tensor | None = None
        for grad, weight in zip(grads, weights, strict=True):
            part = products.input_gradient(grad.flatten(0, -2).to(dtype), weight.to(dtype)).to(ctx.dtype)
            total = part if total is None else total.add_(part)
        assert total is not None, "there is at least one matrix"
        underway.grad = total.view(rows.shape[0] * axis.size, *rows.shape[1:])
        mine, underway.scattering = start_scatter_sum_of_rows(underway.grad, axis)
        return mine, None, *grads


def _is_wanted(ctx: Any, index: int) -> bool:
    """Say whether the node that made an input runs in this backward pass: a split one runs either side alone."""
    node = ctx.next_functions[index][0]
    return node is not None and torch._C._will_engine_execute_node(node)
