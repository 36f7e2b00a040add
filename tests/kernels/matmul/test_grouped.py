"""grouped_linear multiplies each expert's rows with its weight: empty experts, odd sizes, every dtype."""

import pytest
import torch
from twins import assert_like_twin, assert_near, leaf

from meshwright.kernels import reference
from meshwright.kernels.choose import Choices, use
from meshwright.kernels.matmul.grouped import grouped_linear

ONEDNN = Choices("onednn", "onednn", "onednn", bf16_products="fp32")
COUNTS = [[4, 3, 5], [0, 12, 0], [12, 0, 0], [0, 1, 11]]


@pytest.mark.parametrize("choices", [Choices(), ONEDNN, Choices(bf16_products="fp32")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("sizes", [(8, 16), (7, 5)])
def test_grouped_linear_is_its_twin(
    choices: Choices, dtype: torch.dtype, counts: list[int], sizes: tuple[int, int]
) -> None:
    use(choices)
    i, o = sizes
    x, weight = leaf(12, i, dtype=dtype), leaf(3, o, i, dtype=dtype)
    assert_like_twin(grouped_linear, reference.grouped_linear, [x, weight, torch.tensor(counts)])


def test_no_rows_at_all_give_no_rows_and_zero_gradients() -> None:
    x, weight = leaf(0, 8), leaf(3, 16, 8)
    y = grouped_linear(x, weight, torch.zeros(3, dtype=torch.int64))
    assert y.shape == (0, 16)
    of_x, of_weight = torch.autograd.grad(y.sum(), (x, weight))
    assert of_x.shape == (0, 8)
    assert torch.equal(of_weight, torch.zeros(3, 16, 8))


@pytest.mark.parametrize("sizes", [(8, 16), (7, 5)])
@pytest.mark.parametrize("counts", [[4, 3, 4], [4, 3, 6]])
def test_counts_that_do_not_cover_the_rows_are_refused(sizes: tuple[int, int], counts: list[int]) -> None:
    i, o = sizes
    with pytest.raises(ValueError, match=f"counts add up to {sum(counts)} rows, x has 12"):
        grouped_linear(torch.randn(12, i), torch.randn(3, o, i), torch.tensor(counts))


@pytest.mark.parametrize("choices", [Choices(), ONEDNN])
def test_autocast_reaches_the_experts(choices: Choices) -> None:
    use(choices)
    x, weight, counts = leaf(12, 8), leaf(3, 16, 8), torch.tensor([4, 0, 8])
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, weight, counts)
    assert y.dtype == torch.bfloat16
    assert_near(y, reference.grouped_linear(x, weight, counts).to(torch.bfloat16))
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (x, weight))] == [torch.float32] * 2


@pytest.mark.parametrize("sizes", [(8, 16), (7, 5)])
def test_an_expanded_gradient_is_taken(sizes: tuple[int, int]) -> None:
    i, o = sizes
    x, weight, counts = leaf(12, i), leaf(3, o, i), torch.tensor([4, 3, 5])
    of_weight = torch.autograd.grad(grouped_linear(x, weight, counts).sum(), weight)[0]
    torch.testing.assert_close(of_weight[1], x.detach()[4:7].sum(0).expand(o, i))


def test_gradients_agree_with_differences() -> None:
    x, weight, counts = leaf(5, 3, dtype=torch.float64), leaf(3, 2, 3, dtype=torch.float64), torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, counts), (x, weight))
