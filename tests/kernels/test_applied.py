"""A function called without autograd's bookkeeping gives what it gives with it; with it, its gradient is its own."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from twins import leaf

from meshwright.kernels.activations import gated_unit, plain_unit
from meshwright.kernels.applied import applied
from meshwright.kernels.attention.attention import attention
from meshwright.kernels.attention.rope import apply_rope
from meshwright.kernels.attention.seen import Seen
from meshwright.kernels.choose import Choices, use
from meshwright.kernels.matmul.linear import linear
from meshwright.kernels.norms import dynamic_tanh, rms_norm
from meshwright.kernels.states.conv import causal_conv
from meshwright.kernels.states.gated_norm import gated_rms_norm

F64 = torch.float64
SEEN: list[Any] = []
"""The contexts that `_Cubed` was called with, and a reference to what it kept."""


class _Cubed(torch.autograd.Function):
    """weight x^3, which keeps x^2; its gradient is told apart from autograd's own by a factor of `share`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, share: float) -> Tensor:
        square = x * x
        ctx.save_for_backward(x, weight, square)
        ctx.share = share
        SEEN[:] = [ctx, weakref.ref(square)]
        return weight * square * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, square = ctx.saved_tensors
        return ctx.share * grads[0] * 3 * weight * square, ctx.share * grads[0] * square * x, None


def result_and_kept(x: Tensor, weight: Tensor) -> tuple[Tensor, bool]:
    """Return the result, and whether what the function keeps is there still."""
    result = applied(_Cubed, x, weight, 1.0)
    is_bare = not isinstance(SEEN[0], FunctionCtx)
    SEEN[0] = is_bare
    gc.collect()
    return result, SEEN[1]() is not None


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_same_is_made_without_bookkeeping(off: Callable[[], Any]) -> None:
    x, weight = leaf(5, dtype=F64), leaf(5, dtype=F64)
    asked, is_kept = result_and_kept(x, weight)
    assert (SEEN[0], is_kept, asked.requires_grad) == (False, True, True)
    with off():
        made, is_kept = result_and_kept(x, weight)
    assert (SEEN[0], is_kept, made.requires_grad, made.grad_fn) == (True, False, False, None)
    assert torch.equal(made, asked.detach())


def test_inputs_that_want_no_gradient_make_no_graph() -> None:
    made, is_kept = result_and_kept(torch.randn(5), torch.randn(5))
    assert (is_kept, made.requires_grad, made.grad_fn) == (False, False, None)


def test_the_gradient_is_the_functions_own() -> None:
    x, weight = leaf(5, dtype=F64), leaf(5, dtype=F64)
    assert torch.autograd.gradcheck(lambda x, w: applied(_Cubed, x, w, 1.0), (x, weight))
    [halved] = torch.autograd.grad(applied(_Cubed, x, weight, 0.5).sum(), x)
    torch.testing.assert_close(halved, 1.5 * weight.detach() * x.detach() ** 2)


def _rope(x: Tensor) -> Tensor:
    angle = torch.linspace(0, 1, x.shape[0] * x.shape[3] // 2).view(x.shape[0], -1)
    return apply_rope(x, angle.cos(), angle.sin())


def _window(x: Tensor) -> Tensor:
    return attention(x, x.flip(0), x * 2, Seen(window=3))


# Of every kernel that is called so, with an input [s, b, n, d], and one of its weights' size.
KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rms_norm": lambda x, w: rms_norm(x, w, 1e-5),
    "dynamic_tanh": lambda x, w: dynamic_tanh(x, w[:1], w, w.flip(0)),
    "rotary positions": lambda x, w: _rope(x * w),
    "gated unit": lambda x, w: gated_unit(x, x.flip(0) * w, "geglu"),
    "plain unit": lambda x, w: plain_unit(x * w, "relu2"),
    "convolution": lambda x, w: causal_conv(x.flatten(2), w[:3].expand(x[0, 0].numel(), 3)),
    "gated norm": lambda x, w: gated_rms_norm(x, x.flip(0), w, 1e-5, group_size=4),
    "attention in a window": lambda x, w: _window(x * w),
    "product": lambda x, w: linear(x, w.expand(3, -1), w[:3]),
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_that_is_called_so_gives_the_same_either_way(name: str) -> None:
    use(Choices("onednn", "onednn", "onednn"))  # else products go PyTorch's own way, which has bookkeeping of its own
    x, weight = leaf(6, 2, 3, 8), leaf(8)
    asked = KERNELS[name](x, weight)
    assert asked.requires_grad
    with torch.no_grad():
        made = KERNELS[name](x, weight)
    assert made.grad_fn is None
    assert torch.equal(made, asked.detach())
