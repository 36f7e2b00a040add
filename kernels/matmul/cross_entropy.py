"""The output layer and its cross entropy in one, so that all the logits never exist together.

The tokens go by in chunks. A chunk's logits [c, v] become its losses and, where a gradient will be wanted, at once
the chunk's part of both gradients, in the forward pass; then the next chunk overwrites them:

    z = x W^T                     loss_i = logsumexp(z_i) - z_i[target_i]          divided by `divisor`
    p = softmax(z) - onehot       grad x_i = r_i p_i W       grad W += sum_i p_i^T (r_i x_i)

    r_i = 1/divisor for a counted token, 0 for another

so the backward only multiplies both gradients by what arrives from above. Sums are made in at least fp32, in the
order of the tokens. A chunk is as large as stays in the processor's cache on a CPU, and large enough to fill a GPU.
This file knows one vocabulary; a vocabulary in parts is `parallel/tensor/vocabulary.py`'s.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meshwright.kernels.limits import USUAL, Limits
from meshwright.kernels.matmul import products
from meshwright.kernels.matmul.linear import uses_own_products
from meshwright.kernels.precision import at_least_fp32, result_dtype

NOT_COUNTED = -100
"""The target of a token whose prediction does not count, such as padding."""


def linear_cross_entropy(
    x: Float[Tensor, "t h"],
    weight: Float[Tensor, "v h"],
    targets: Int[Tensor, " t"],
    *,
    divisor: float,
    limits: Limits = USUAL,
) -> Float[Tensor, ""]:
    """Return the sum of the counted tokens' cross entropy, over `divisor`; targets of -100 are not counted."""
    how = _How(divisor, products_dtype(x), max(1, limits.logits(x.device.type) // weight.shape[0]))
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return _loss_and_gradients(x, weight, targets, how, wants_gradients=False)[0]
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets, how)  # type: ignore[no-untyped-call]
    return loss


def products_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that the output layer multiplies in: autocast's, but fp32 where a CPU's bf16 goes that way."""
    dtype = result_dtype(x)
    if dtype == torch.bfloat16 and x.device.type == "cpu" and uses_own_products(x, dtype):
        return torch.float32
    return dtype


class _How(NamedTuple):
    divisor: float
    dtype: torch.dtype
    """Of the products; everything else is in at least fp32."""
    rows: int
    """Tokens in a chunk."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, how: _How) -> Tensor:
        loss, *gradients = _loss_and_gradients(x, weight, targets, how, wants_gradients=True)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = x.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_x, of_weight = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        return (of_x * grads[0]).to(x_dtype), (of_weight * grads[0]).to(weight_dtype), None, None


def _loss_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, how: _How, *, wants_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and both gradients, which are empty when they are not wanted."""
    divisor, dtype, rows = how
    weight = weight.to(dtype)
    wide = at_least_fp32(weight[:0]).dtype
    loss = torch.zeros((), dtype=wide, device=x.device)
    of_x = torch.empty_like(x, dtype=wide) if wants_gradients else loss
    of_weight = torch.zeros_like(weight, dtype=wide) if wants_gradients else loss
    for begin in range(0, x.shape[0], rows):
        part = slice(begin, begin + rows)
        x_part = x[part].to(dtype)
        chunk_loss, p, share = _chunk(x_part, weight, targets[part], divisor)
        loss += chunk_loss
        if wants_gradients:
            p = p.to(dtype)
            torch.mul(products.input_gradient(p, weight), share, out=of_x[part])
            products.add_weight_gradient(p, (x_part * share).to(dtype), of_weight)
        del p  # before the next chunk's logits are there
    return loss, of_x, of_weight


def _chunk(x: Tensor, weight: Tensor, targets: Tensor, divisor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the chunk's summed loss over divisor, softmax - onehot [c, v], and each token's share r [c, 1]."""
    logits = at_least_fp32(products.output(x, weight))
    counted = targets != NOT_COUNTED
    own = torch.where(counted, targets, 0)[:, None]  # another below 0 is refused by the gather
    of_target = logits.gather(1, own)
    top = logits.amax(1, keepdim=True)
    p = torch.softmax(logits, 1, out=logits)  # each row is read before it is written; nobody needs the logits again
    # The largest probability is exp(0) / sum, so the logarithm of the sum costs one more look at p and no exp.
    log_sum = top - p.amax(1, keepdim=True).log()
    share = (counted.to(p.dtype) / divisor)[:, None]  # not counted / divisor: that is in fp32
    loss = torch.where(counted[:, None], log_sum - of_target, 0).sum() / divisor
    return loss, p.scatter_add_(1, own, p.new_full((1, 1), -1.0).expand_as(own)), share
