"""The three matrix products of a linear layer on the CPU, each by the library that was chosen for it.

    output             y = x W^T     [t, i] [o, i] -> [t, o]
    input gradient     g W           [t, o] [o, i] -> [t, i]
    weight gradient    g^T x         [t, o] [t, i] -> [o, i]

MKL takes any of the layouts as it is. oneDNN's linear operator wants the rows of its first argument contiguous, so
the weight gradient needs one transposed copy: of the smaller of x and g.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from meshwright.kernels.choose import current
from meshwright.kernels.precision import without_autocast


@torch.library.custom_op("meshwright::onednn_product", mutates_args=())
def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T through oneDNN. A private operator of torch, wrapped so that torch.compile sees its shape."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


@onednn_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def inferred_output(
    x: Float[Tensor, "*tokens i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "*tokens o"] | None:
    """Return x W^T + bias through oneDNN where no gradient is asked for; None where that is not the way.

    What torch.library adds around an operator takes half as long as the product of one token with a narrow matrix.
    oneDNN reads the bias as o numbers of fp32 that lie one behind the other, whatever it is.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.dtype != torch.float32:
        return None
    if not _by_onednn(x, current().fp32_output) or torch.is_autocast_enabled("cpu"):
        return None
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != torch.float32 or bias.stride(0) != 1):
        return None
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def output(
    x: Float[Tensor, "t i"], weight: Float[Tensor, "o i"], *, out: Float[Tensor, "t o"] | None = None
) -> Float[Tensor, "t o"]:
    """Return x W^T; in `out`, if that is given."""
    if _by_onednn(x, current().fp32_output):
        return _placed(onednn_product(x, weight), out)
    return _by_torch(x, weight.t(), out)


def input_gradient(
    grad: Float[Tensor, "t o"], weight: Float[Tensor, "o i"], *, out: Float[Tensor, "t i"] | None = None
) -> Float[Tensor, "t i"]:
    """Return g W; in `out`, if that is given."""
    if _by_onednn(grad, current().fp32_input_gradient):
        return _placed(onednn_product(grad, weight.t()), out)
    return _by_torch(grad, weight, out)


def weight_gradient(
    grad: Float[Tensor, "t o"], x: Float[Tensor, "t i"], *, out: Float[Tensor, "o i"] | None = None
) -> Float[Tensor, "o i"]:
    """Return g^T x; in `out`, if that is given."""
    if _by_onednn(grad, current().fp32_weight_gradient):
        return _placed(_weight_gradient_by_onednn(grad, x), out)
    return _by_torch(grad.t(), x, out)


def add_weight_gradient(grad: Float[Tensor, "t o"], x: Float[Tensor, "t i"], total: Float[Tensor, "o i"]) -> None:
    """Add g^T x to `total`, which MKL does without a tensor in between."""
    if _by_onednn(grad, current().fp32_weight_gradient):
        total += _weight_gradient_by_onednn(grad, x)
    elif total.dtype == x.dtype:
        with without_autocast(x):
            total.addmm_(grad.t(), x)
    else:
        total += _by_torch(grad.t(), x, None)


def _by_onednn(x: Tensor, library: str) -> bool:
    # oneDNN is not asked for a product of nothing: an expert may have no rows.
    return library == "onednn" and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0


def _weight_gradient_by_onednn(grad: Tensor, x: Tensor) -> Tensor:
    (t, o), i = grad.shape, x.shape[1]
    if t * o <= t * i + o * i:
        product: Tensor = onednn_product(grad.t().contiguous(), x.t())
    else:
        product = onednn_product(x.t().contiguous(), grad.t()).t().contiguous()
    return product


def _by_torch(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    with without_autocast(a):
        direct = out if out is not None and out.dtype == a.dtype else None
        product: Tensor = torch.mm(a, b, out=direct)
    return product if direct is not None else _placed(product, out)


def _placed(product: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return product
    out.copy_(product)
    return out
