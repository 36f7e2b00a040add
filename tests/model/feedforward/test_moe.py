"""A mixture of experts against a loop over tokens; its losses, its counts, and what it remembers of a step."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.model.feedforward.experts import Experts
from meshwright.model.feedforward.mlp import Inner, Mlp
from meshwright.model.feedforward.moe import Moe, RouterLosses
from meshwright.model.routers.router import Ways
from meshwright.model.routers.topk import TopKRouter
from meshwright.parallel.mesh import Axis, single_process_mesh
from meshwright.parallel.tally import Tally
from meshwright.parallel.where import Where, where_of_plain_tokens

S, B, H, F_, E, K = 6, 2, 5, 7, 4, 2


def moe(*, bias: bool = True, shared: bool = True, normalise: bool = True, **changes: object) -> Moe:
    part = Moe(
        TopKRouter(H, E, K, Ways(normalise)),
        Experts(H, F_, E, Inner(bias=bias)),
        shared=Mlp(H, 3, Inner(bias=bias)) if shared else None,
        **changes,
    ).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    part.reset_buffers()
    return part


def x_of(seed: int = 1) -> Tensor:
    return torch.randn(S, B, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def where(length: int = S, step_tokens: float = float(S * B)) -> Where:
    """Return a place in which `length` tokens of sample 1 count, and all of sample 0."""
    plain = where_of_plain_tokens(torch.zeros(S, B, dtype=torch.int64))
    counted = plain.counted.clone()
    counted[length:, 1] = False
    return replace(plain, counted=counted, sequence_tokens=counted.sum(0), step_tokens=step_tokens)


def one_expert(part: Moe, e: int, x: Tensor) -> Tensor:
    experts = part.experts
    biases = [b[e] if b is not None else 0.0 for b in (experts.gate_bias, experts.up_bias, experts.down_bias)]
    gate, up = experts.gate[e] @ x + biases[0], experts.up[e] @ x + biases[1]
    return experts.down[e] @ (F.silu(gate) * up) + biases[2]


def by_loop(part: Moe, x: Tensor, normalise: bool) -> Tensor:
    rows = []
    for token in x.flatten(0, 1):
        probability = (part.router.weight @ token).softmax(0)
        chosen = sorted(range(E), key=lambda e: (-probability[e].item(), e))[:K]
        total = sum(probability[e] for e in chosen) if normalise else 1.0
        y = sum(probability[e] / total * one_expert(part, e, token) for e in chosen)
        if part.shared is not None:
            y = y + part.shared(token[None, None])[0, 0]
        rows.append(y)
    return torch.stack(rows).view(S, B, H)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("bias", "shared"), [(True, True), (False, False)])
def test_a_token_is_the_weighted_sum_of_its_experts(bias: bool, shared: bool, normalise: bool) -> None:
    part, x = moe(bias=bias, shared=shared, normalise=normalise), x_of().requires_grad_()
    y, expected = part(x, where(), None), by_loop(part, x, normalise)
    torch.testing.assert_close(y, expected)
    above = torch.randn_like(expected)
    of = [x, *part.parameters()]
    pairs = zip(torch.autograd.grad(y, of, above), torch.autograd.grad(expected, of, above), strict=True)
    for gradient, wanted in pairs:
        torch.testing.assert_close(gradient, wanted)


def test_the_mlp_is_its_formula() -> None:
    mlp, x = moe().shared, x_of()
    assert mlp is not None
    gate, up = x @ mlp.gate.weight.T + mlp.gate.bias, x @ mlp.up.weight.T + mlp.up.bias
    torch.testing.assert_close(mlp(x), (F.silu(gate) * up) @ mlp.down.weight.T + mlp.down.bias)


def tally_of(part: Moe) -> Tally:
    return Tally(part.tally_entries())


@pytest.mark.parametrize("kind", ["sequence", "step", "none"])
def test_losses_reach_the_router_with_their_weights_and_the_tally_without(kind: str) -> None:
    part = moe(losses=RouterLosses(kind, 0.3, 0.7))
    tally, place = tally_of(part), where(length=4, step_tokens=30.0)
    (0 * part(x_of(), place, tally)).sum().backward()
    sums = tally.reduce(single_process_mesh())

    weight = part.router.weight.detach().clone().requires_grad_()
    scores = x_of() @ weight.T
    probability, expert = scores.softmax(-1), scores.topk(K).indices
    counted = place.counted
    z = (scores.logsumexp(-1).square() * counted).sum() / 30
    balance = torch.zeros((), dtype=torch.float64)
    load = F.one_hot(expert, E).sum(2) * counted[..., None]
    if kind == "sequence":
        for b, length in enumerate((S, 4)):
            f, p = load[:, b].sum(0) / (length * K), probability[:length, b].mean(0)
            balance = balance + length / 30 * E * (f * p).sum()
    if kind == "step":  # before the first step every expert's share is the same
        balance = E * (0.25 * probability * counted[..., None]).sum() / 30
    (0.3 * balance + 0.7 * z).backward()
    torch.testing.assert_close(part.router.weight.grad, weight.grad)
    assert sums["moe.z"].item() == pytest.approx(z.item())
    assert sums["moe.balance"].item() == pytest.approx(balance.item())
    assert sums["moe.load"].tolist() == load.sum((0, 1)).tolist()
    assert sums["moe.load"].sum() == (S + 4) * K


def test_nothing_is_counted_or_attached_in_evaluation() -> None:
    part = moe(losses=RouterLosses("sequence", 0.3, 0.7))
    tally = tally_of(part)
    trained = part(x_of(), where(), tally)
    assert tally.reduce(single_process_mesh())["moe.load"].sum() > 0
    part.eval()
    assert torch.equal(part(x_of(), where(), tally), trained)
    assert all(value.abs().sum() == 0 for value in tally.reduce(single_process_mesh()).values())


def test_the_step_loss_counts_with_the_share_of_the_step_before_and_keeps_it_in_a_buffer() -> None:
    part = moe(losses=RouterLosses("step", 1.0))
    tally = tally_of(part)
    assert part.state_dict()["previous_share"].tolist() == [0.25] * E
    shares = []
    for step in range(2):
        part(x_of(step), where(), tally)
        sums = tally.reduce(single_process_mesh())
        probability = (x_of(step) @ part.router.weight.T).softmax(-1)
        share = shares[-1] if shares else torch.full((E,), 0.25, dtype=torch.float64)
        assert sums["moe.balance"].item() == pytest.approx(E * (share * probability.mean((0, 1))).sum().item())
        part.finish_step(sums)
        shares.append(sums["moe.load"] / (S * B * K))
        torch.testing.assert_close(part.state_dict()["previous_share"], shares[-1])
    assert not torch.equal(shares[0], shares[1])
    part.finish_step({"moe.load": torch.zeros(E, dtype=torch.float64)})  # a step in which nothing counted
    assert torch.isfinite(part.previous_share).all()
    part.reset_buffers()
    assert part.previous_share.tolist() == [0.25] * E
    assert "previous_share" not in moe(losses=RouterLosses("sequence")).state_dict()


def test_tokens_one_after_the_other_give_what_the_sequence_gives() -> None:
    part, x = moe(), x_of()
    state = part.initial_state(B, S)
    steps = torch.cat([part.step(token, state) for token in x.split(1)])
    torch.testing.assert_close(steps, part(x, where(), None))


def test_experts_that_ep_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts = 4 does not divide by ep = 3"):
        Experts(H, F_, E, ep=Axis("ep", 3))


def test_one_place_can_serve_many_passes_each_with_its_own_routing() -> None:
    part, place = moe(), where()
    for seed in (1, 2, 3):
        assert torch.equal(part(x_of(seed), place, None), part(x_of(seed), where(), None))
