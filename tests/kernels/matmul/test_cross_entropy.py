"""linear_cross_entropy is its twin, chunk by chunk, whatever comes from above, and never holds all the logits."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from twins import assert_like_twin, leaf

from meshwright.kernels import reference
from meshwright.kernels.choose import Choices, use
from meshwright.kernels.limits import Limits
from meshwright.kernels.matmul import products
from meshwright.kernels.matmul.cross_entropy import linear_cross_entropy

T, H, V = 23, 6, 11
TARGETS = torch.tensor([3, -100, 0, 10, 5, 5, -100, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, -100, 1, 2, 4])


SEVERAL = pytest.mark.parametrize("limits", [Limits(logits_on_cpu=rows * V + 1) for rows in (1, 5, 23, 100)])


@SEVERAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("choices", [Choices(), Choices("onednn", "onednn", "onednn")])
def test_loss_is_its_twin_for_any_chunk(dtype: torch.dtype, choices: Choices, limits: Limits) -> None:
    use(choices)
    inputs = [leaf(T, H, dtype=dtype), leaf(V, H, dtype=dtype), TARGETS]
    in_chunks = partial(linear_cross_entropy, limits=limits)
    assert_like_twin(in_chunks, reference.linear_cross_entropy, inputs, divisor=7.5)


@SEVERAL
@pytest.mark.parametrize("choices", [Choices(), Choices(bf16_products="fp32")])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_of_bf16_is_summed_in_fp32(choices: Choices, autocast: bool, limits: Limits) -> None:
    use(choices)
    dtype = torch.float32 if autocast else torch.bfloat16
    x, weight = leaf(T, H, dtype=dtype), leaf(V, H, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(x, weight, TARGETS, divisor=20.0, limits=limits)
    expected = reference.linear_cross_entropy(x, weight, TARGETS, divisor=20.0)
    assert loss.dtype == torch.float32
    # Logits that were rounded to bf16 are 2^-9 off each; the mean of twenty is less.
    torch.testing.assert_close(loss, expected, rtol=4e-3, atol=0.0)
    for gradient, wanted in zip(
        torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(expected, (x, weight)), strict=True
    ):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, wanted, rtol=0.0, atol=0.02 * wanted.abs().max().item())


def test_loss_agrees_with_torch_and_with_differences() -> None:
    x, weight = leaf(T, H, dtype=torch.float64), leaf(V, H, dtype=torch.float64)
    mean = F.cross_entropy(x @ weight.T, TARGETS)
    counted = float((TARGETS != -100).sum())
    torch.testing.assert_close(linear_cross_entropy(x, weight, TARGETS, divisor=counted), mean)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, TARGETS, divisor=3.0), (x, weight))


def test_no_counted_token_gives_an_exact_zero_that_propagates() -> None:
    x, weight = leaf(T, H), leaf(V, H)
    loss = linear_cross_entropy(x, weight, torch.full((T,), -100), divisor=5.0)
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(x.grad, torch.zeros(T, H))
    assert torch.equal(weight.grad, torch.zeros(V, H))


def test_no_tokens_at_all_give_zero() -> None:
    x, weight = leaf(0, H), leaf(V, H)
    loss = linear_cross_entropy(x, weight, torch.empty(0, dtype=torch.int64), divisor=5.0)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(weight.grad, torch.zeros(V, H))


def test_what_comes_from_above_scales_both_gradients_each_time() -> None:
    x, weight = leaf(T, H), leaf(V, H)
    loss = linear_cross_entropy(x, weight, TARGETS, divisor=4.0)
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    thrice = torch.autograd.grad(loss, (x, weight), torch.tensor(3.0), retain_graph=True)
    again = torch.autograd.grad(loss, (x, weight))
    for a, b, c in zip(once, thrice, again, strict=True):
        torch.testing.assert_close(b, 3 * a)
        assert torch.equal(a, c)


def test_large_logits_do_not_overflow() -> None:
    x, weight = leaf(T, H, scale=300.0), leaf(V, H, scale=300.0)
    assert_like_twin(linear_cross_entropy, reference.linear_cross_entropy, [x, weight, TARGETS], divisor=1.0)


@SEVERAL
def test_without_gradients_the_loss_has_the_same_bits_and_less_is_multiplied(
    limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = leaf(T, H), leaf(V, H)
    loss_of = partial(linear_cross_entropy, targets=TARGETS, divisor=4.0, limits=limits)
    with_gradients = loss_of(x, weight)
    monkeypatch.setattr(products, "input_gradient", None)  # calling it would raise
    with torch.no_grad():
        assert torch.equal(loss_of(x, weight), with_gradients.detach())
    assert torch.equal(loss_of(x.detach(), weight.detach()), with_gradients.detach())


def test_never_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = products.output

    def watched(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0])
        return plain(x, weight)

    monkeypatch.setattr(products, "output", watched)
    linear_cross_entropy(leaf(T, H), leaf(V, H), TARGETS, divisor=1.0, limits=Limits(logits_on_cpu=5 * V)).backward()
    assert seen == [5, 5, 5, 5, 3]


def test_the_same_call_gives_the_same_bits() -> None:
    x, weight = leaf(200, 16), leaf(50, 16)
    targets = torch.randint(0, 50, (200,))
    calls = [linear_cross_entropy(x, weight, targets, divisor=4.0) for _ in range(2)]
    assert torch.equal(calls[0], calls[1])
    first, second = (torch.autograd.grad(loss, (x, weight)) for loss in calls)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_products_in_fp32_leave_the_loss_of_autocast_unrounded() -> None:
    x, weight = leaf(T, H), leaf(V, H)
    plain = linear_cross_entropy(x, weight, TARGETS, divisor=4.0)
    use(Choices(bf16_products="fp32"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_cross_entropy(x, weight, TARGETS, divisor=4.0), plain)


def test_a_target_below_zero_that_is_not_left_out_is_no_word() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="index -1 is out of bounds"):
        linear_cross_entropy(x, weight, torch.tensor([1, -1, -100]), divisor=1.0)
