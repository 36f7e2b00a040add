"""What stands between the products of a feed-forward: one table of gated and of plain units.

    gated   f(gate) * up      swiglu  f = silu          (Shazeer 2020, "GLU Variants Improve Transformer")
                              geglu   f = gelu, by tanh (as Gemma's `gelu_pytorch_tanh`)
                              geglu_erf   f = gelu, exact
                              reglu   f = relu
                              glu     f = sigmoid       (Dauphin et al. 2017)
    plain   f(x)              relu, gelu (exact), gelu_tanh, silu
                              relu2   f = relu(x)^2     (So et al. 2021, "Primer")

Each keeps its inputs for the backward pass and nothing else; f is computed again there. With x [t, f], a gated unit by
plain autograd would keep a third tensor of that size, relu2 a second.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from meshwright.kernels.applied import applied

_aten = torch.ops.aten


class Point(NamedTuple):
    """A function of single numbers (its result is a new tensor), and of a gradient: (grad, x) -> x's."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


class Unit(NamedTuple):
    """What the name of an activation stands for."""

    is_gated: bool
    point: Point


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _of_sigmoid(grad: Tensor, x: Tensor) -> Tensor:
    result: Tensor = _aten.sigmoid_backward(grad, x.sigmoid())
    return result


_RELU = Point(torch.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0))
_GELU = Point(F.gelu, lambda grad, x: _aten.gelu_backward(grad, x))
_GELU_TANH = Point(_gelu_tanh, lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"))
_SILU = Point(F.silu, lambda grad, x: _aten.silu_backward(grad, x))
_SIGMOID = Point(torch.sigmoid, _of_sigmoid)
_RELU2 = Point(lambda x: torch.relu(x).square_(), lambda grad, x: torch.relu(x).mul_(2).mul_(grad))

ACTIVATIONS = {
    "swiglu": Unit(True, _SILU),
    "geglu": Unit(True, _GELU_TANH),
    "geglu_erf": Unit(True, _GELU),
    "reglu": Unit(True, _RELU),
    "glu": Unit(True, _SIGMOID),
    "relu": Unit(False, _RELU),
    "gelu": Unit(False, _GELU),
    "gelu_tanh": Unit(False, _GELU_TANH),
    "silu": Unit(False, _SILU),
    "relu2": Unit(False, _RELU2),
}


def unit_of(name: str) -> Unit:
    """Return what a name stands for.

    Raises:
        ValueError: if there is no activation of this name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation = {name!r} is unknown; one of {', '.join(ACTIVATIONS)} would fit")
    return ACTIVATIONS[name]


def gated_unit(
    gate: Float[Tensor, "*tokens f"], up: Float[Tensor, "*tokens f"], name: str = "swiglu"
) -> Float[Tensor, "*tokens f"]:
    """Return f(gate) * up in gate's dtype."""
    return applied(_Gated, gate, up, name)


def plain_unit(x: Float[Tensor, "*tokens f"], name: str = "gelu") -> Float[Tensor, "*tokens f"]:
    """Return f(x) in x's dtype."""
    return applied(_Plain, x, name)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name = name
        return ACTIVATIONS[name].point.value(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        point = ACTIVATIONS[ctx.name].point
        return point.gradient(grads[0] * up, gate), point.value(gate).mul_(grads[0]), None


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        return ACTIVATIONS[name].point.value(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ACTIVATIONS[ctx.name].point.gradient(grads[0], x), None
