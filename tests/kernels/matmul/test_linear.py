"""linear gives x W^T + bias, whichever library multiplies, in the dtype that autocast would give."""

import re

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from twins import assert_like_twin, assert_near, leaf

from meshwright.kernels import reference
from meshwright.kernels.choose import Choices, use
from meshwright.kernels.matmul import products
from meshwright.kernels.matmul.linear import linear

ONEDNN = Choices("onednn", "onednn", "onednn")
WIDENED = Choices(bf16_products="fp32")
WIDENED_ONEDNN = Choices("onednn", "onednn", "onednn", bf16_products="fp32")
ALL = [Choices(), ONEDNN, WIDENED, WIDENED_ONEDNN, Choices(fp32_weight_gradient="onednn")]


@pytest.mark.parametrize("choices", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3, 7, 11), (1, 1, 33, 5), (2, 17, 5, 33)])
def test_linear_is_its_twin_with_every_library(
    choices: Choices, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    use(choices)
    s, b, i, o = shape
    x, weight, bias = leaf(s, b, i, dtype=dtype), leaf(o, i, dtype=dtype), leaf(o, dtype=dtype)
    assert_like_twin(linear, reference.linear, [x, weight])
    assert_like_twin(linear, reference.linear, [x, weight, bias])


def test_onednn_multiplies_like_torch() -> None:
    x, weight = torch.randn(130, 70), torch.randn(90, 70)
    error = (products.onednn_product(x, weight) - F.linear(x, weight)).norm() / F.linear(x, weight).norm()
    assert error < 1e-6


@pytest.mark.parametrize("choices", [Choices(), WIDENED, WIDENED_ONEDNN])
def test_autocast_gives_bf16_from_fp32_weights_and_fp32_gradients(choices: Choices) -> None:
    use(choices)
    x, weight, bias = leaf(6, 8), leaf(5, 8), leaf(5)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert_near(y, reference.linear(x, weight, bias).to(torch.bfloat16))
    gradients = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert [g.dtype for g in gradients] == [torch.float32] * 3


def test_widened_products_are_rounded_once() -> None:
    use(WIDENED)
    x, weight = leaf(6, 40), leaf(5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight)
    assert torch.equal(y, F.linear(x, weight).to(torch.bfloat16))


@pytest.mark.parametrize("choices", ALL)
def test_fp64_is_not_touched_by_autocast(choices: Choices) -> None:
    use(choices)
    x, weight = leaf(3, 4, dtype=torch.float64), leaf(5, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("choices", [ONEDNN, WIDENED])
def test_a_frozen_weight_or_input_needs_no_gradient(choices: Choices) -> None:
    use(choices)
    dtype = torch.float32 if choices == ONEDNN else torch.bfloat16
    x, weight = leaf(4, 6, dtype=dtype), leaf(3, 6, dtype=dtype)
    assert_like_twin(linear, reference.linear, [x, weight.detach()])
    assert_like_twin(linear, reference.linear, [x.detach(), weight])


def test_a_gradient_that_is_expanded_is_taken() -> None:
    use(ONEDNN)
    x, weight = leaf(4, 6), leaf(3, 6)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(3, 6))


@pytest.mark.parametrize("choices", ALL)
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_products_write_into_and_add_to_what_they_are_given(choices: Choices, rows: int) -> None:
    use(choices)
    x, weight, grad = torch.randn(rows, 6), torch.randn(9, 6), torch.randn(rows, 9)
    for product, expected in [
        (lambda out: products.output(x, weight, out=out), x @ weight.T),
        (lambda out: products.input_gradient(grad, weight, out=out), grad @ weight),
        (lambda out: products.weight_gradient(grad, x, out=out), grad.T @ x),
    ]:
        out = torch.full_like(expected, torch.nan)
        assert product(out) is out
        torch.testing.assert_close(out, expected)
    total = torch.ones(9, 6)
    products.add_weight_gradient(grad, x, total)
    torch.testing.assert_close(total, 1 + grad.T @ x)


@pytest.mark.parametrize("choices", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 7, 11), (0, 2, 7, 3), (2, 0, 7, 3), (3, 2, 16, 5)])
def test_without_a_gradient_it_is_its_twin_too(
    choices: Choices, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    use(choices)
    s, b, i, o = shape
    x, weight, bias = torch.randn(b, s, i, dtype=dtype).transpose(0, 1), leaf(o, i, dtype=dtype), leaf(o, dtype=dtype)
    with torch.no_grad():
        for given in (None, bias):
            y, expected = linear(x, weight, given), reference.linear(x, weight, given)
            assert y.dtype == expected.dtype
            assert_near(y, expected)
            with torch.autocast("cpu", torch.bfloat16):
                cast = linear(x, weight, given)
            assert cast.dtype == (dtype if dtype == torch.float64 else torch.bfloat16)
            assert_near(cast, expected.to(cast.dtype))


BIASES = {
    "of every second number": lambda: torch.randn(10)[::2],
    "one number, expanded": lambda: torch.randn(1).expand(5),
    "one number": lambda: torch.randn(1),
    "bf16": lambda: torch.randn(5, dtype=torch.bfloat16),
    "fp64": lambda: torch.randn(5, dtype=torch.float64),
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("choices", [ONEDNN, WIDENED_ONEDNN])
def test_a_bias_of_any_layout_and_type_is_added(name: str, choices: Choices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # one number stands for five
    use(choices)
    x, weight, bias = torch.randn(3, 2, 4), torch.randn(5, 4), BIASES[name]()
    for is_asked_for in (True, False):
        with torch.set_grad_enabled(is_asked_for):
            y = linear(x, weight, bias)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, (x @ weight.T + bias).float())


@pytest.mark.parametrize("choices", ALL)
@pytest.mark.parametrize("wants_gradient", [True, False])
@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 3), (3,)])
def test_other_numbers_of_features_are_told_by_both_shapes(
    choices: Choices, wants_gradient: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which outside of tests checks nothing
    use(choices)
    ours = rf"^x {re.escape(str(list(shape)))} times weight \[5, 4\]: their last dims must be the same$"
    by_torch = r"^mat1 and mat2 shapes cannot be multiplied \(\d+x\d and 4x5\)$"
    with torch.set_grad_enabled(wants_gradient), pytest.raises((ValueError, RuntimeError), match=f"{ours}|{by_torch}"):
        linear(torch.randn(shape), torch.randn(5, 4))


@pytest.mark.parametrize("choices", ALL)
def test_a_single_row_may_come_without_a_dim_of_its_own(choices: Choices) -> None:
    use(choices)
    assert_like_twin(linear, reference.linear, [leaf(4), leaf(5, 4), leaf(5)])
    with torch.no_grad():
        x, weight = torch.randn(4), torch.randn(5, 4)
        torch.testing.assert_close(linear(x, weight), weight @ x)
