"""Routing: each router against its formula in a loop, ties to the lower index, weights, and scores in at least fp32."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from part_samples import ROUTER_KEYS
from torch import Tensor
from transformers import DeepseekV3Config, SwitchTransformersConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from meshwright.model.parts import initialise
from meshwright.model.routers.capacity import taken_choices
from meshwright.model.routers.expert_choice import ExpertChoiceRouter, as_choices
from meshwright.model.routers.router import Router, Ways, within_groups
from meshwright.model.routers.sigmoid import SigmoidRouter
from meshwright.model.routers.sinkhorn import SinkhornRouter, sinkhorn_columns
from meshwright.model.routers.table import ROUTERS, make_router
from meshwright.model.routers.topk import TopKRouter
from meshwright.parallel.mesh import NO_TP, single_process_mesh
from meshwright.parallel.tally import Tally
from meshwright.parallel.where import Where, place

H, E, T = 6, 8, 40
S, B = 20, 3


def router(
    top_k: int = 2, ways: Ways | None = None, kind: str = "softmax", dtype: torch.dtype = torch.float64, e: int = E
) -> Router:
    made = make_router(kind, H, e, top_k, ways or Ways()).to(dtype)
    initialise(made, seed=3)
    with torch.no_grad():
        made.weight.copy_(torch.randn(e, H, generator=torch.Generator().manual_seed(0)))
    return made


def x_of(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def batch(seed: int = 1, length: int = S) -> tuple[Tensor, Where]:
    """Return tokens and their place: some of sample 1 do not count, and none of sample 2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(length, B, H, dtype=torch.float64, generator=generator)
    counted = torch.ones(length, B, dtype=torch.bool)
    counted[:, 1] = torch.rand(length, generator=generator) > 0.3
    counted[:, 2] = False
    document, sample = torch.zeros(length, B, dtype=torch.int64), torch.arange(B) + 5
    step_tokens = float(counted.sum())
    return x, place(sample, document, counted, torch.arange(length), NO_TP, step=7, step_tokens=step_tokens, seed=9)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, E])
def test_a_token_goes_to_its_most_probable_experts(top_k: int, normalise: bool) -> None:
    made, x = router(top_k, Ways(normalise)), x_of()
    expert, weight, scores, probability, taken = made(x)
    assert taken is None
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


@pytest.mark.parametrize("kind", ROUTERS)
def test_scores_are_in_at_least_fp32_also_under_autocast(kind: str) -> None:
    wide, narrow = (router(1, kind=kind, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        found = wide(x_of(torch.float32))
    exact = wide(x_of(torch.float32))
    assert found.scores.dtype == torch.float32
    assert torch.equal(found.scores, exact.scores)
    of_narrow = narrow(x_of(torch.bfloat16))
    assert of_narrow.scores.dtype == of_narrow.weight.dtype == torch.float32
    rounded = x_of(torch.bfloat16).double() @ narrow.weight.double().T
    torch.testing.assert_close(of_narrow.scores.double(), rounded, rtol=1e-5, atol=1e-6)
    assert router(1, kind=kind)(x_of()).scores.dtype == torch.float64


@pytest.mark.parametrize("kind", ROUTERS)
def test_the_gradient_flows_through_the_weights_and_not_through_the_choice(kind: str) -> None:
    made, (x, where) = router(1 if kind == "switch" else 2, kind=kind), batch(length=4)
    fixed = where.remembering()  # a step of gradcheck must not move a choice
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: made(x, fixed).weight, (x,))
    weight = made.weight.detach().clone().requires_grad_()

    def of_weight(weight: Tensor) -> Tensor:
        routing = torch.func.functional_call(made, {"weight": weight}, (x.detach(), fixed))
        return routing.weight.sum(-1) + routing.probability.square().sum(-1)

    assert torch.autograd.gradcheck(of_weight, (weight,))
    assert not made(x, where).expert.requires_grad


@pytest.mark.parametrize("top_k", [0, 9])
def test_more_experts_than_there_are_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k = {top_k} must be from 1 to num_experts = 8"):
        TopKRouter(H, E, top_k)


def test_what_a_router_does_not_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router = 'hash' is unknown; one of softmax, sigmoid, .* would fit"):
        make_router("hash", H, E, 2)
    with pytest.raises(ValueError, match="top_k = 2: a Switch router sends a token to one expert; 1 would fit"):
        make_router("switch", H, E, 2)
    with pytest.raises(ValueError, match="the weights of SinkhornRouter never sum to 1; leave it out"):
        make_router("sinkhorn", H, E, 2, Ways(normalise=True))
    with pytest.raises(ValueError, match="NoisyTopKRouter knows no groups"):
        make_router("noisy", H, E, 2, Ways(num_groups=2))
    with pytest.raises(ValueError, match="num_experts = 8 does not divide by num_groups = 3"):
        make_router("sigmoid", H, E, 2, Ways(num_groups=3))
    with pytest.raises(ValueError, match="top_groups = 5 must be from 1 to num_groups = 4"):
        make_router("sigmoid", H, E, 2, Ways(num_groups=4, top_groups=5))
    with pytest.raises(ValueError, match="= 2 experts, and at least 3 are needed"):
        make_router("softmax", H, E, 3, Ways(num_groups=4, top_groups=1))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("best", [1, 2])
def test_groups_are_chosen_by_their_best_experts(best: int, seed: int) -> None:
    ranking = torch.randint(0, 5, (T, E), generator=torch.Generator().manual_seed(seed)).double()  # many ties
    found = within_groups(ranking, 4, 2, best)
    for token in range(T):
        groups = [ranking[token, 2 * g : 2 * g + 2].tolist() for g in range(4)]
        kept = sorted(range(4), key=lambda g: (-sum(sorted(groups[g])[-best:]), g))[:2]
        expected = [ranking[token, e].item() if e // 2 in kept else -math.inf for e in range(E)]
        assert found[token].tolist() == expected


@pytest.mark.parametrize(("kind", "best"), [("softmax", 1), ("sigmoid", 2)])
def test_groups_change_choices_with_the_keys_of_the_samples_too(kind: str, best: int) -> None:
    keys = {"top_k": 2, "top_groups": 1} | ROUTER_KEYS[kind]
    top_k, groups, kept = (keys[key] for key in ("top_k", "num_groups", "top_groups"))
    free = router(top_k, kind=kind, e=6)(x_of())
    found = router(top_k, Ways(num_groups=groups, top_groups=kept), kind, e=6)(x_of()).expert
    expected = within_groups(free.probability, groups, kept, best).sort(dim=-1, descending=True).indices[:, :top_k]
    assert torch.equal(found, expected)
    assert not torch.equal(found, free.expert)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_sigmoid_router_is_that_of_deepseek_v3(normalise: bool) -> None:
    config = DeepseekV3Config(
        hidden_size=H,
        n_routed_experts=E,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=normalise,
    )
    theirs = DeepseekV3TopkRouter(config)
    ours = router(3, Ways(normalise, 2.5, num_groups=4, top_groups=2), "sigmoid", torch.float32)
    x, bias = x_of(torch.float32), torch.randn(E, generator=torch.Generator().manual_seed(2)) * 0.3
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(bias)
        ours.bias.copy_(bias)
    _, weight, expert = theirs(x)
    found = ours(x)
    order = expert.argsort(-1)
    assert torch.equal(found.expert.sort(-1).values, expert.gather(-1, order))
    ours_sorted = found.weight.gather(-1, found.expert.argsort(-1))
    torch.testing.assert_close(ours_sorted, weight.gather(-1, order))
    torch.testing.assert_close(found.probability, found.scores.sigmoid() / found.scores.sigmoid().sum(-1, keepdim=True))
    with torch.no_grad():
        ours.bias.zero_()
    assert not torch.equal(ours(x).expert, found.expert)  # the bias chose


def test_the_bias_moves_by_the_sign_of_what_is_missing() -> None:
    made = router(2, Ways(bias_rate=0.125), "sigmoid")
    assert made.bias.tolist() == [0.0] * E
    load = torch.tensor([4, 3, 2, 4, 3, 2, 3, 3], dtype=torch.float64)
    made.finish_step({"moe.load": load})
    made.finish_step({"moe.load": load + 1})
    assert made.bias.tolist() == [-0.25, 0.0, 0.25, -0.25, 0.0, 0.25, 0.0, 0.0]
    made.finish_step({"moe.load": torch.zeros(E, dtype=torch.float64)})  # nothing counted: nothing moves
    assert made.bias.tolist() == [-0.25, 0.0, 0.25, -0.25, 0.0, 0.25, 0.0, 0.0]
    assert made.state_dict().keys() == {"weight", "bias"}
    made.reset_buffers()
    assert not made.bias.any()


def test_loads_become_even_without_a_loss() -> None:
    made, x = router(2, Ways(bias_rate=0.02), "sigmoid"), x_of()
    loads = []
    for _ in range(200):
        load = torch.bincount(made(x).expert.flatten(), minlength=E).double()
        loads.append(load.max().item())
        made.finish_step({"moe.load": load})
    assert loads[0] >= 16
    assert max(loads[-20:]) <= 12  # ten are even


def test_the_switch_router_is_that_of_transformers_with_its_capacity() -> None:
    config = SwitchTransformersConfig(d_model=H, num_experts=E, expert_capacity=3)
    theirs, ours = SwitchTransformersTop1Router(config).eval(), router(1, kind="switch", dtype=torch.float32)
    with torch.no_grad():
        theirs.classifier.weight.copy_(ours.weight)
    x = x_of(torch.float32)[:19, None]  # ceil(1.25 * 19 / 8) = 3
    counted = torch.ones(19, 1, dtype=torch.bool)
    where = place(torch.arange(1), counted.long(), counted, torch.arange(19), NO_TP, step=0, step_tokens=19.0)
    found = ours(x, where)
    taken = taken_choices(found.expert, where, ours.token, factor=1.25, num_experts=E)
    one_hot, weight, scores = theirs(x.transpose(0, 1))
    assert torch.equal(F.one_hot(found.expert[:, 0, 0], E) * taken[:, 0], one_hot[0])
    assert (~taken).sum() > 0
    torch.testing.assert_close(found.weight[:, 0], weight[0])
    torch.testing.assert_close(found.scores[:, 0], scores[0])


def megatron_sinkhorn(cost: Tensor, tol: float = 0.0001) -> Tensor:
    """Balance as megatron-core's moe_utils does, written down from its description: rows, then columns, until still."""
    cost = torch.exp(cost)
    d0, d1 = torch.ones(cost.size(0)).to(cost), torch.ones(cost.size(1)).to(cost)
    eps, error, d1_old = 0.00000001, 1e9, d1
    while error > tol:
        d0 = (1 / d0.size(0)) * 1 / (torch.sum(d1 * cost, 1) + eps)
        d1 = (1 / d1.size(0)) * 1 / (torch.sum(d0.unsqueeze(1) * cost, 0) + eps)
        error, d1_old = torch.mean(torch.abs(d1_old - d1)).item(), d1
    return d1 * cost * d0.unsqueeze(1)


@pytest.mark.parametrize("top_k", [1, 2])
def test_sinkhorn_balances_each_sequence_by_itself_over_what_counts(top_k: int) -> None:
    made, (x, where) = router(top_k, kind="sinkhorn"), batch()
    found = made(x, where)
    for b in (0, 1):
        counted = where.counted[:, b]
        expected = megatron_sinkhorn(found.scores[counted, b].detach()).topk(top_k, dim=-1).indices
        assert torch.equal(found.expert[counted, b], expected)
        load, plain = (
            torch.bincount(e.flatten(), minlength=E) for e in (expected, found.scores[counted, b].topk(top_k).indices)
        )
        assert load.square().sum() < plain.square().sum()
    probability = found.scores.sigmoid() if top_k == 1 else found.scores.softmax(-1)
    torch.testing.assert_close(found.weight, probability.gather(-1, found.expert))
    made.eval()
    best = found.scores.topk(top_k).indices
    assert torch.equal(made(x, where).expert, best)
    assert torch.equal(made.train()(x).expert, best)


def test_sinkhorn_ends_for_scores_that_hardly_settle() -> None:
    scores = torch.randn(S, 2, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    scores[:, 1] *= 300
    counted = torch.ones(S, 2, dtype=torch.bool)
    together = sinkhorn_columns(scores, counted)
    assert torch.isfinite(together).all()
    alone = torch.cat([sinkhorn_columns(scores[:, b : b + 1], counted[:, b : b + 1]) for b in range(2)])
    torch.testing.assert_close(together[0], alone[0])


def test_experts_choose_their_best_tokens_of_each_sequence() -> None:
    made, (x, where) = router(2, kind="expert_choice"), batch()
    found = made(x, where)
    chosen = torch.zeros(S, B, E, dtype=torch.bool)
    for b in range(B):
        tokens = where.counted[:, b].nonzero().flatten().tolist()
        capacity = math.ceil(2 * len(tokens) / E)
        for e in range(E):
            best = sorted(tokens, key=lambda s, b=b, e=e: (-found.probability[s, b, e].item(), s))[:capacity]
            chosen[best, b, e] = True
    assert_choices(found.expert, found.taken, chosen)
    torch.testing.assert_close(found.weight, found.probability.gather(-1, found.expert) * found.taken)
    assert found.taken.sum(-1).max() == found.taken.shape[-1] > 2
    assert not found.taken[:, 2].any()
    assert found.taken[where.counted].sum(-1).min() == 1


def assert_choices(expert: Tensor, taken: Tensor, chosen: Tensor) -> None:
    found = torch.zeros_like(chosen)
    for k in range(expert.shape[-1]):
        found |= F.one_hot(expert[..., k], E).bool() & taken[..., k, None]
    assert torch.equal(found, chosen)
    assert torch.equal(taken.sum(-1), chosen.sum(-1))


def test_at_inference_thresholds_decide_and_later_tokens_do_not() -> None:
    made, (x, where) = router(2, kind="expert_choice"), batch()
    made.threshold.copy_(torch.linspace(0.05, 0.4, E))
    whole = made.eval()(x, where)
    assert_choices(whole.expert, whole.taken, whole.probability > made.threshold)
    for s in (1, 7):
        part = made(x[:s])
        assert_choices(part.expert, part.taken, (whole.probability > made.threshold)[:s])
    made.threshold.fill_(2.0)
    nobody = made(x)
    assert nobody.expert.shape[-1] == 1
    assert not nobody.taken.any()
    assert not nobody.weight.any()


def test_thresholds_follow_what_the_experts_take() -> None:
    made, (x, where) = router(2, Ways(bias_rate=0.01), "expert_choice"), batch()
    assert made.threshold.tolist() == [0.125] * E
    for _ in range(80):
        tally = Tally({"moe.load": E} | made.tally_entries())
        routing = made(x, where)
        made.count(routing, where, tally)
        load = torch.bincount(routing.expert[routing.taken], minlength=E)
        tally.add("moe.load", load)
        sums = tally.reduce(single_process_mesh())
        before = made.threshold.clone()
        made.finish_step(sums)
        torch.testing.assert_close(made.threshold - before, 0.01 * torch.sign(sums["moe.passed"] - load))
    assert (sums["moe.passed"] - sums["moe.load"]).abs().max() <= 4
    assert isinstance(made, ExpertChoiceRouter)


def test_choices_of_different_numbers_are_padded() -> None:
    takes = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    expert, taken = as_choices(takes)
    assert expert[0].tolist() == [0, 2]
    assert expert[2, 0] == 1
    assert taken.tolist() == [[True, True], [False, False], [True, False]]
    assert as_choices(takes[:0])[0].shape == (0, 1)


def test_noise_is_drawn_by_the_token_and_its_scale_is_learned() -> None:
    made, (x, where) = router(2, kind="noisy"), batch()
    clean = made.eval()(x, where).scores
    noisy = made.train()(x, where).scores
    assert torch.equal(made(x, where).scores, noisy)
    noise = (noisy - clean) / math.log(2)  # the scale begins at softplus(0)
    assert abs(noise.mean()) < 0.15
    assert abs(noise.std() - 1) < 0.1
    part = replace(where, position=where.position[3:5], counted=where.counted[3:5])
    torch.testing.assert_close(made(x[3:5], part).scores, noisy[3:5])
    with torch.no_grad():
        made.noise_weight.normal_(generator=torch.Generator().manual_seed(0))
    found = made(x, where)
    scale = F.softplus(x @ made.noise_weight.T)
    torch.testing.assert_close(found.scores, clean + noise * scale)
    of = (made.noise_weight, found.scores.sum()), (made.noise_weight, (noise.detach() * scale).sum())
    learned, wanted = (torch.autograd.grad(total, weight, retain_graph=True)[0] for weight, total in of)
    torch.testing.assert_close(learned, wanted)
    assert learned.any()
    torch.testing.assert_close(found.weight, found.scores.gather(-1, found.expert).softmax(-1))


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_recomputed_pass_finds_the_choice_of_the_first(kind: str) -> None:
    made, (x, where) = router(1, kind=kind), batch()
    remembering = where.remembering()
    first = made(x, remembering)
    with torch.no_grad():
        made.weight.neg_()
    again = made(x, remembering)
    assert torch.equal(first.expert, again.expert)
    assert first.taken is again.taken
    assert not torch.equal(made(x, where).expert, first.expert)


def test_jitter_is_only_of_training_and_only_of_what_the_router_sees() -> None:
    made, (x, where) = router(2, Ways(jitter=0.3)), batch()
    still = router(2)(x, where)
    assert not torch.equal(made(x, where).scores, still.scores)
    assert torch.equal(made(x).scores, still.scores)
    assert torch.equal(made.eval()(x, where).scores, still.scores)


def test_the_table_holds_the_routers() -> None:
    assert ROUTERS["sigmoid"] is SigmoidRouter
    assert ROUTERS["sinkhorn"] is SinkhornRouter


@pytest.mark.parametrize("kind", ROUTERS)
def test_what_is_kept_of_a_choice_is_not_all_experts(kind: str) -> None:
    made, (x, where) = router(1, kind=kind), batch()
    for trains in (True, False):
        expert = made.train(trains)(x, where).expert
        assert expert.untyped_storage().nbytes() == expert.nbytes
