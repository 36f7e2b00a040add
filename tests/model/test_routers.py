"""Routing: the k most probable experts, ties to the lower index, weights, and scores in at least fp32."""

import pytest
import torch

from meshwright.model.routers.topk import TopKRouter

H, E, T = 6, 8, 40


def router(top_k: int = 2, *, normalise: bool = True, dtype: torch.dtype = torch.float64) -> TopKRouter:
    made = TopKRouter(H, E, top_k, normalise=normalise).to(dtype)
    with torch.no_grad():
        made.weight.copy_(torch.randn(E, H, generator=torch.Generator().manual_seed(0)))
    return made


def x_of(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, E])
def test_a_token_goes_to_its_most_probable_experts(top_k: int, normalise: bool) -> None:
    made, x = router(top_k, normalise=normalise), x_of()
    expert, weight, scores, probability = made(x)
    for token in range(T):
        scored = [float(made.weight[e].detach() @ x[token]) for e in range(E)]
        total = sum(torch.tensor(scored).double().exp().tolist())
        probable = [float(torch.tensor(score).double().exp()) / total for score in scored]
        order = sorted(range(E), key=lambda e: -probable[e])[:top_k]
        assert expert[token].tolist() == order
        divisor = sum(probable[e] for e in order) if normalise else 1.0
        assert weight[token].tolist() == pytest.approx([probable[e] / divisor for e in order], rel=1e-6)
        assert scores[token].tolist() == pytest.approx(scored)
        assert probability[token].tolist() == pytest.approx(probable, rel=1e-6)


def test_among_equals_the_lower_expert_is_taken() -> None:
    made = router(3)
    with torch.no_grad():
        made.weight.zero_()
    assert made(x_of()).expert.tolist() == [[0, 1, 2]] * T
    with torch.no_grad():
        made.weight[[6, 3, 5]] = torch.ones(H, dtype=torch.float64)
    assert made(x_of().abs()).expert.tolist() == [[3, 5, 6]] * T
    assert made(-x_of().abs()).expert.tolist() == [[0, 1, 2]] * T


def test_scores_are_in_at_least_fp32_also_under_autocast() -> None:
    wide, narrow = router(dtype=torch.float32), router(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = wide(x_of(torch.float32))
    exact = wide(x_of(torch.float32))
    assert found.scores.dtype == torch.float32
    assert torch.equal(found.scores, exact.scores)
    of_narrow = narrow(x_of(torch.bfloat16))
    assert of_narrow.scores.dtype == of_narrow.weight.dtype == torch.float32
    rounded = x_of(torch.bfloat16).double() @ narrow.weight.double().T
    torch.testing.assert_close(of_narrow.scores.double(), rounded, rtol=1e-5, atol=1e-6)
    assert router()(x_of()).scores.dtype == torch.float64


def test_the_gradient_flows_through_the_weights_and_not_through_the_choice() -> None:
    made, x = router(2), x_of().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: made(x).weight, (x,))
    assert not made(x).expert.requires_grad


@pytest.mark.parametrize("top_k", [0, 9])
def test_more_experts_than_there_are_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k = {top_k} must be from 1 to num_experts = 8"):
        TopKRouter(H, E, top_k)
