"""Normalisation of each token's vector: root-mean-square, layer norm, dynamic tanh. The first, forward and backward:

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

from meshwright.kernels.applied import applied
from meshwright.kernels.precision import at_least_fp32, without_autocast


def rms_norm(x: Float[Tensor, "*tokens h"], weight: Float[Tensor, " h"], eps: float) -> Float[Tensor, "*tokens h"]:
    """Divide each vector by its root mean square and scale each feature; sums in at least fp32, result in x's dtype."""
    if x.device.type != "cpu":
        wide = at_least_fp32(x)
        normalised: Tensor = F.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype), eps)
        return normalised.to(x.dtype)
    return applied(_RmsNorm, x, weight, eps)


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


def layer_norm(
    x: Float[Tensor, "*tokens h"], weight: Float[Tensor, " h"], bias: Float[Tensor, " h"], eps: float
) -> Float[Tensor, "*tokens h"]:
    """Centre each vector, divide it by its deviation, scale and shift each feature; sums in at least fp32."""
    wide = at_least_fp32(x)
    with without_autocast(x):
        normalised = F.layer_norm(wide, (x.shape[-1],), weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return normalised.to(x.dtype)


def dynamic_tanh(
    x: Float[Tensor, "*tokens h"], alpha: Float[Tensor, "1"], weight: Float[Tensor, " h"], bias: Float[Tensor, " h"]
) -> Float[Tensor, "*tokens h"]:
    """Return tanh(alpha x) * weight + bias, computed in at least fp32; x is all that is kept for the backward."""
    return applied(_DynamicTanh, x, alpha, weight, bias)


class _DynamicTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha, weight)
        ctx.bias_dtype = bias.dtype
        y: Tensor = (at_least_fp32(x) * alpha).tanh_().mul_(weight).add_(bias)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, alpha, weight = ctx.saved_tensors
        wide, grad = at_least_fp32(x), at_least_fp32(grads[0])
        t = (wide * alpha).tanh_()
        over = tuple(range(x.dim() - 1))
        of_bias, of_weight = grad.sum(over), (grad * t).sum(over)
        inner = (grad * weight).mul_(t.square_().neg_().add_(1.0))  # of alpha x
        of_alpha = (inner * wide).sum().view(1)
        of_x = inner.mul_(alpha).to(x.dtype)
        return of_x, of_alpha.to(alpha.dtype), of_weight.to(weight.dtype), of_bias.to(ctx.bias_dtype)
