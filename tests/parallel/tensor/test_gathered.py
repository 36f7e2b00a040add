"""Products of gathered rows: the numbers of a gather and plain products, in an order in which nothing waits early."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from collective_calls import Call, watching
from rank_pool import run_ranks
from torch import Tensor
from torch.testing import assert_close

from meshwright.kernels.choose import Choices, use
from meshwright.kernels.matmul import products
from meshwright.kernels.matmul.linear import linear
from meshwright.parallel.collectives import gather
from meshwright.parallel.mesh import Axis
from meshwright.parallel.tensor.gathered import Matrix, products_of_gathered

S, B, H, WIDTHS = 6, 3, 10, (4, 7)
Products = Callable[[Tensor, list[Matrix], Axis], list[Tensor]]


def plainly(x: Tensor, matrices: list[Matrix], axis: Axis) -> list[Tensor]:
    whole = gather(x, axis)
    return [linear(whole, *matrix) for matrix in matrices]


def given(axis: Axis, dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[Tensor, list[Matrix], list[Tensor]]:
    """Return this rank's rows, its matrices, the first with a bias, and the gradients of the results."""
    torch.manual_seed(axis.rank)
    x = torch.randn(S, B, H, dtype=dtype, requires_grad=True)
    weights = [torch.randn(width, H, dtype=weight_dtype, requires_grad=True) for width in WIDTHS]
    bias = torch.randn(WIDTHS[0], dtype=weight_dtype, requires_grad=True)
    grads = [torch.randn(S * axis.size, B, width, dtype=dtype) for width in WIDTHS]
    return x, [Matrix(weights[0], bias), Matrix(weights[1])], grads


def numbers(axis: Axis, way: Products, dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool) -> list[Tensor]:
    x, matrices, grads = given(axis, dtype, weight_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = way(torch.tanh(x), matrices, axis)
    torch.autograd.backward(results, [grad.to(y.dtype) for grad, y in zip(grads, results, strict=True)])
    leaves = [x, matrices[0].weight, matrices[0].bias, matrices[1].weight]
    return [y.detach() for y in results] + [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]


def both(
    tp: Axis, choices: Choices, dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool
) -> tuple[list[Tensor], list[Tensor]]:
    use(choices)
    ways: list[Products] = [products_of_gathered, plainly]
    ours, expected = (numbers(tp, way, dtype, weight_dtype, autocast) for way in ways)
    return ours, expected


@pytest.mark.parametrize(
    ("choices", "dtype", "weight_dtype", "autocast", "rounding"),
    [
        (Choices(), torch.float64, torch.float64, False, 1e-14),
        (Choices(), torch.float32, torch.float32, False, 1e-6),
        (Choices("onednn", "onednn", "onednn"), torch.float32, torch.float32, False, 1e-6),
        (Choices(), torch.float32, torch.float32, True, 2**-8),
        (Choices(bf16_products="fp32"), torch.float32, torch.float32, True, 2**-8),
        (Choices(), torch.bfloat16, torch.bfloat16, False, 2**-8),
        (Choices(bf16_products="fp32"), torch.bfloat16, torch.float32, False, 2**-8),
    ],
    ids=["fp64", "fp32", "fp32 by oneDNN", "autocast", "autocast, widened", "bf16", "bf16, widened"],
)
def test_the_numbers_are_those_of_a_gather_and_plain_products(
    choices: Choices, dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool, rounding: float
) -> None:
    """The gradients by the two matrices are added in another order: a rounding or two of the largest value."""
    for ours, expected in run_ranks(2, both, choices, dtype, weight_dtype, autocast):
        assert len(ours) == len(expected) == 6
        for mine, theirs in zip(ours, expected, strict=True):
            assert mine.dtype == theirs.dtype
            assert_close(mine, theirs, rtol=0, atol=4 * rounding * theirs.abs().max().item())


class Events(list[str]):
    """What happens, in order: collectives as they start and are waited for, and the products of a backward pass."""

    def before(self, call: Call) -> None:
        self.append(call.op)

    def after(self, call: Call, work: Any) -> None:
        return None

    def waited(self, work: Any) -> None:
        self.append("wait")

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Hear of products too."""
        plain = products.input_gradient, products.weight_gradient

        def told(name: str, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(*args: Tensor) -> Tensor:
                self.append(name)
                return product(*args)

            return call

        products.input_gradient, products.weight_gradient = told("of input", plain[0]), told("of weight", plain[1])  # type: ignore[assignment]
        try:
            with watching(self):
                yield
        finally:
            products.input_gradient, products.weight_gradient = plain


def events_of_a_backward(tp: Axis) -> list[str]:
    x, matrices, grads = given(tp, torch.float64, torch.float64)
    results = products_of_gathered(torch.tanh(x), matrices, tp)
    events = Events()
    with events.heard():
        torch.autograd.backward(results, grads)
    return list(events)


def test_a_gather_goes_on_beside_the_products_and_a_sum_beside_the_weights() -> None:
    order = ["all_gather", "of input", "of input", "reduce_scatter", "wait", "of weight", "of weight", "wait"]
    assert run_ranks(2, events_of_a_backward) == [order, order]


def split_backward(tp: Axis) -> tuple[list[str], list[str], list[float]]:
    x, matrices, grads = given(tp, torch.float64, torch.float64)
    weights = [matrix.weight for matrix in matrices]
    middle = torch.tanh(x)
    results = products_of_gathered(middle, matrices, tp)
    expected = torch.autograd.grad(results, [middle, *weights], grads, retain_graph=True)
    of_input, of_weights = Events(), Events()
    with of_input.heard():
        found = torch.autograd.grad(results, [middle], grads, retain_graph=True)
    with of_weights.heard():
        found += torch.autograd.grad(results, weights, grads)
    return of_input, of_weights, [(a - b).abs().max().item() for a, b in zip(found, expected, strict=True)]


def test_a_split_backward_pass_makes_each_gradient_once() -> None:
    for of_input, of_weights, errors in run_ranks(2, split_backward):
        assert of_input == ["of input", "of input", "reduce_scatter", "wait"]
        assert of_weights == ["all_gather", "wait", "of weight", "of weight"]
        assert errors == [0.0] * 3


def kept_between_passes(tp: Axis) -> int:
    """Return the bytes that are saved and are no weight."""
    x, matrices, _ = given(tp, torch.float64, torch.float64)
    weights = {matrix.weight.data_ptr() for matrix in matrices}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        products_of_gathered(x, matrices, tp)
    return sum(saved.values())


def test_only_the_ranks_own_rows_are_kept() -> None:
    assert run_ranks(2, kept_between_passes) == [S * B * H * 8] * 2
