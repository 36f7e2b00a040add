"""In a step of generation the experts of a few tokens are computed one by one, and give what the sorted way gives."""

import pytest
import torch
from torch import Tensor
from twins import BF16_STEPS

from meshwright.kernels.choose import Choices, use
from meshwright.model.feedforward.experts import Experts
from meshwright.model.feedforward.mlp import Inner
from meshwright.model.feedforward.moe import Moe
from meshwright.model.parts import initialise
from meshwright.model.routers.topk import TopKRouter
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.mesh import Axis

H, F, E = 8, 16, 6
ONEDNN = Choices("onednn", "onednn", "onednn", bf16_products="fp32")
# Each token's experts, in the order of its choices; in the second two tokens share one.
CHOSEN = [[[4, 1]], [[5, 2], [2, 0]], [[3], [3], [3]], [[0], [1], [2], [3], [4]]]


def part(inner: Inner, dtype: torch.dtype = torch.float32) -> Moe:
    init = InitPolicy(std=0.5)
    made = Moe(TopKRouter(H, E, 2, init=init), Experts(H, F, E, inner, init=init))
    initialise(made, seed=1)
    for name, parameter in made.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return made.to(dtype).eval()


def assert_close(found: Tensor, expected: Tensor) -> None:
    """As torch does; in bf16 both ways round between products, biases and unit, so twice what one kernel is allowed."""
    assert found.dtype == expected.dtype
    bf16 = {"rtol": 0.0, "atol": 2 * BF16_STEPS * expected.abs().max().item()}
    torch.testing.assert_close(found, expected, **(bf16 if found.dtype == torch.bfloat16 else {}))


def sorted_way(experts: Experts, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    rows, counts, sent = experts.exchange.send(x, expert, weight)
    return experts.exchange.bring_back(experts(rows, counts), sent)


@pytest.mark.parametrize("inner", [Inner("swiglu", bias=True), Inner("gelu"), Inner("relu2", bias=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("choices", [Choices(), ONEDNN])
@pytest.mark.parametrize("chosen", CHOSEN)
def test_one_by_one_is_the_sorted_way(
    inner: Inner, dtype: torch.dtype, choices: Choices, chosen: list[list[int]]
) -> None:
    use(choices)
    experts, expert = part(inner, dtype).experts, torch.tensor(chosen)
    x, weight = torch.randn(len(chosen), H, dtype=dtype), torch.rand(expert.shape)
    with torch.no_grad():
        assert experts.takes_one_by_one(x, expert)
        found, expected = experts.one_by_one(x, expert, weight), sorted_way(experts, x, expert, weight)
    assert_close(found, expected)


@pytest.mark.parametrize("choices", [Choices(), ONEDNN])
def test_under_autocast_too(choices: Choices) -> None:
    use(choices)
    experts, expert = part(Inner("swiglu", bias=True)).experts, torch.tensor([[4, 1]])
    x, weight = torch.randn(1, H), torch.rand(1, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = experts.one_by_one(x, expert, weight), sorted_way(experts, x, expert, weight)
    assert found.dtype == torch.bfloat16
    assert_close(found, expected)


def test_a_step_of_few_tokens_sorts_nothing_and_one_of_many_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sent = part(Inner()), []
    usual = made.experts.exchange.send
    monkeypatch.setattr(made.experts.exchange, "send", lambda *given: sent.append(given) or usual(*given))
    state, whole = made.initial_state(1), made.initial_state(1)
    x = torch.randn(5, 1, H)
    with torch.no_grad():
        one_by_one = torch.cat([made.step(token, state) for token in x.split(1)])
        assert not sent
        torch.testing.assert_close(one_by_one, made.step(x, whole))
    assert len(sent) == 1
    assert torch.equal(state.read()[0], whole.read()[0])
    made.step(x[:1], made.initial_state(1))
    assert len(sent) == 2, "where a gradient is asked for"


def test_experts_that_lie_on_many_ranks_are_sorted() -> None:
    x, expert = torch.randn(1, H), torch.tensor([[0, 1]])
    with torch.no_grad():
        assert part(Inner()).experts.takes_one_by_one(x, expert)
        for axes in ({"ep": Axis("ep", 2)}, {"etp": Axis("etp", 2)}):
            assert not Experts(H, F, E, **axes).takes_one_by_one(x, expert)


def test_a_step_of_no_tokens_gives_none() -> None:
    made = part(Inner())
    state, none = made.initial_state(1), torch.randn(0, 1, H)
    with torch.no_grad():
        assert made.step(none, state).shape == none.shape
    assert state.length == 0
