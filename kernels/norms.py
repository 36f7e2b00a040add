"""Root-mean-square normalisation, forward and backward.

    y = x r w           r = 1 / sqrt(mean(x^2) + eps), one number for each token

    c_t = sum_h g w x                      grad x = r (g w) - x r^3 c / h
    grad w = sum_t g x r                   with p = g x:  c = p w,  grad w = p^T r, two matrix-vector products

PyTorch's own operator takes a dozen passes over the tokens on a CPU; these take three and six, and keep x and r only.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from meshwright.kernels.precision import at_least_fp32, without_autocast


def rms_norm(x: Float[Tensor, "*tokens h"], weight: Float[Tensor, " h"], eps: float) -> Float[Tensor, "*tokens h"]:
    """Divide each vector by its root mean square and scale each feature; sums in at least fp32, result in x's dtype."""
    if x.device.type != "cpu":
        wide = at_least_fp32(x)
        normalised: Tensor = F.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype), eps)
        return normalised.to(x.dtype)
    y: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = at_least_fp32(x)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        r = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        y: Tensor = (wide * r).mul_(weight)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        wide, grad = at_least_fp32(x), at_least_fp32(grads[0])
        w = weight.to(wide.dtype)
        p = (grad * wide).reshape(-1, x.shape[-1])
        with without_autocast(x):
            of_weight = torch.mv(p.t(), r.reshape(-1))
            c = torch.mv(p, w).view_as(r)
        c.mul_(r).mul_(r).mul_(r).div_(-x.shape[-1])
        of_x = (grad * w).mul_(r).addcmul_(wide, c)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None
