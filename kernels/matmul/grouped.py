"""Products of each expert's rows with its own weight, in one operation with one backward.

    x [t, i], sorted by expert      y [t, o]
    counts[0] rows  x weight[0]^T = counts[0] rows
    counts[1] rows  x weight[1]^T = counts[1] rows
    ...

Two ways, the second wherever the first does not serve:

    F.grouped_mm    torch's operator: on a GPU one kernel for all experts, and the counts stay there. What it asks for
                    is seen to here: no fp64 (and bf16 only on a GPU), rows of a multiple of 16 bytes, contiguous
                    gradients; autocast does not know it; rows past the counts it leaves uninitialised.
    each            a product for each expert, written into its rows of one result: any dtype, any size, and on a
                    CPU by the library that was chosen (`choose.py`)

Both stand inside one operator of ours, so that torch.compile sees a shape and not the counts.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from meshwright.kernels.matmul import products
from meshwright.kernels.matmul.linear import uses_own_products
from meshwright.kernels.precision import at_least_fp32, autocast_inputs, result_dtype, without_autocast

_ROW_BYTES = 16


def slower_than_grouped(device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> str | None:
    """Return why products of these widths cannot go by F.grouped_mm here, for the log; None if they do."""
    name = str(dtype).removeprefix("torch.")
    if device.type not in ("cpu", "cuda"):
        why = "does not exist there"
    elif device.type == "cuda" and dtype != torch.bfloat16:
        why = "is fast with bf16 alone"
    elif dtype == torch.float64:
        why = "takes no fp64"
    elif odd := [width for width in dict.fromkeys(widths) if width * dtype.itemsize % _ROW_BYTES != 0]:
        wide = " and ".join(f"{width} ({width * dtype.itemsize} bytes)" for width in odd)
        why = f"asks for rows of a multiple of {_ROW_BYTES} bytes, and a rank's are {wide} wide"
    else:
        return None
    return f"products of experts ({name}) on {device.type} go one expert after the other: F.grouped_mm {why}"


def grouped_linear(
    x: Float[Tensor, "t i"], weight: Float[Tensor, "e o i"], counts: Int[Tensor, " e"]
) -> Float[Tensor, "t o"]:
    """Multiply each expert's rows with its own weight; rows are sorted by expert, counts[e] of them each.

    Raises:
        ValueError: if the counts do not add up to the rows of x. (A GPU is not asked where that would make it wait.)
    """
    dtype = result_dtype(x)
    widen = dtype == torch.bfloat16 and uses_own_products(x, dtype)
    if not widen:
        x, weight = autocast_inputs(x, weight)
    y: Tensor = grouped_product(x, weight, counts, dtype, widen)
    return y


@torch.library.custom_op("meshwright::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weight: Tensor, counts: Tensor, dtype: torch.dtype, widen: bool) -> Tensor:
    """Return each expert's rows times its weight, in `dtype`; with `widen` the products are made in fp32."""
    if _grouped_mm_serves(x, weight, widen):
        with without_autocast(x):
            return F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=_ends(counts, x))
    y = x.new_empty(x.shape[0], weight.shape[1], dtype=dtype)
    for rows, w in zip(_stretches(counts, x), weight.unbind(), strict=True):
        products.output(_widened(x[rows], widen), _widened(w, widen), out=y[rows])
    return y


@torch.library.custom_op("meshwright::grouped_product_gradients", mutates_args=())
def grouped_product_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor, widen: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of weight; an expert without rows gets zeros."""
    if _grouped_mm_serves(x, weight, widen):
        ends = _ends(counts, x)
        with without_autocast(x):
            return F.grouped_mm(grad, weight, offs=ends), F.grouped_mm(grad.t(), x.contiguous(), offs=ends)
    of_x, of_weight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    for expert, rows in enumerate(_stretches(counts, x)):
        g, w = _widened(grad[rows], widen), _widened(weight[expert], widen)
        products.input_gradient(g, w, out=of_x[rows])
        products.weight_gradient(g, _widened(x[rows], widen), out=of_weight[expert])
    return of_x, of_weight


@grouped_product.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor, dtype: torch.dtype, widen: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1], dtype=dtype)


@grouped_product_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor, widen: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, counts, _, ctx.widen = inputs
    ctx.save_for_backward(x, weight, counts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    x, weight, counts = ctx.saved_tensors
    of_x, of_weight = grouped_product_gradients(grad.contiguous(), x, weight, counts, ctx.widen)
    return of_x, of_weight, None, None, None


grouped_product.register_autograd(_backward, setup_context=_save)


def _grouped_mm_serves(x: Tensor, weight: Tensor, widen: bool) -> bool:
    """Say whether F.grouped_mm takes these tensors and is as fast as the products one by one."""
    if x.shape[0] == 0 or x.dtype != weight.dtype or widen or uses_own_products(x, x.dtype):
        return False
    return slower_than_grouped(x.device, x.dtype, weight.shape[1:]) is None


def _widened(x: Tensor, widen: bool) -> Tensor:
    return at_least_fp32(x) if widen else x


def _ends(counts: Tensor, x: Tensor) -> Tensor:
    """Return where each expert's rows end, as F.grouped_mm wants it."""
    if counts.device.type == "cpu":
        _check_counts(counts, x)
    return counts.cumsum(0).to(device=x.device, dtype=torch.int32)


def _stretches(counts: Tensor, x: Tensor) -> list[slice]:
    """Return each expert's rows."""
    _check_counts(counts, x)
    ends = counts.cumsum(0).tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def _check_counts(counts: Tensor, x: Tensor) -> None:
    if int(counts.sum()) != x.shape[0]:
        raise ValueError(f"counts add up to {int(counts.sum())} rows, x has {x.shape[0]}")
