"""The units of feed-forwards are their twins and torch's own functions, and keep their inputs alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from twins import assert_like_twin, leaf

from meshwright.kernels import reference
from meshwright.kernels.activations import ACTIVATIONS, gated_unit, plain_unit, unit_of

F64 = torch.float64
GATED = [name for name, unit in ACTIVATIONS.items() if unit.is_gated]
PLAIN = [name for name, unit in ACTIVATIONS.items() if not unit.is_gated]
TORCHS = {
    "swiglu": F.silu,
    "geglu": lambda x: F.gelu(x, approximate="tanh"),
    "geglu_erf": F.gelu,
    "reglu": F.relu,
    "glu": torch.sigmoid,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x) ** 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_unit_is_its_twin(name: str, dtype: torch.dtype) -> None:
    kernel, twin = (gated_unit, reference.gated_unit) if name in GATED else (plain_unit, reference.plain_unit)
    for shape in [(5, 3, 7), (1, 33), (0, 4)]:
        inputs = [leaf(*shape, dtype=dtype) for _ in range(1 + (name in GATED))]
        assert_like_twin(kernel, twin, [*inputs, name])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_unit_is_what_torch_computes_and_its_gradient_agrees_with_differences(name: str) -> None:
    x, up = leaf(4, 5, dtype=F64), leaf(4, 5, dtype=F64)
    if name in GATED:
        torch.testing.assert_close(gated_unit(x, up, name), TORCHS[name](x) * up)
        assert torch.autograd.gradcheck(lambda gate, up: gated_unit(gate, up, name), (x, up))
    else:
        torch.testing.assert_close(plain_unit(x, name), TORCHS[name](x))
        assert torch.autograd.gradcheck(lambda x: plain_unit(x, name), (x,))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_unit_keeps_its_inputs_and_changes_none(name: str) -> None:
    inputs = [leaf(3, 4) for _ in range(1 + (name in GATED))]
    before, kept = [x.detach().clone() for x in inputs], []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = (gated_unit if name in GATED else plain_unit)(*inputs, name)
    y.sum().backward()
    assert set(kept) <= {x.data_ptr() for x in inputs}
    for x, was in zip(inputs, before, strict=True):
        assert torch.equal(x, was)


def test_an_unknown_activation_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"activation = 'swish' is unknown; one of swiglu, geglu, .* would fit"):
        unit_of("swish")
