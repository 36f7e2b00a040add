"""Routers times feed-forwards on one process: against a loop, differences, decoding, what is dropped and recorded."""

from dataclasses import replace

import pytest
import torch
from engine_cases import moe_config
from torch import Tensor

from meshwright.kernels import reference
from meshwright.kernels.activations import ACTIVATIONS
from meshwright.model.feedforward.experts import Experts
from meshwright.model.feedforward.mlp import Inner, Mlp
from meshwright.model.feedforward.moe import Moe, RouterLosses, SharedGate
from meshwright.model.kinds.feedforward.mlp import GATED, FfnActivation
from meshwright.model.kinds.feedforward.moe import RouterKind
from meshwright.model.parts import build_model, initialise
from meshwright.model.routers.router import Ways
from meshwright.model.routers.table import ROUTERS, make_router
from meshwright.parallel.experts.deep_ep import DeepEpExchange
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.mesh import NO_EP, NO_TP, single_process_mesh
from meshwright.parallel.tally import Tally, declared_entries
from meshwright.parallel.where import Where, place

S, B, H, F, E = 7, 2, 6, 5, 4
F64 = torch.float64
INIT = InitPolicy(std=0.7)


def top_k_of(router: str) -> int:
    return 1 if router == "switch" else 2


def moe(router: str = "softmax", inner: Inner | None = None, ways: Ways | None = None, **changes: object) -> Moe:
    inner = inner or Inner(bias=True)
    part = Moe(
        make_router(router, H, E, top_k_of(router), ways or Ways(), init=INIT),
        Experts(H, F, E, inner, init=INIT),
        shared=Mlp(H, 3, inner._replace(dropout=0.0), init=INIT),
        shared_gate=SharedGate(H, init=INIT),
        **changes,
    ).double()
    initialise(part, seed=1)
    for name, parameter in part.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return part


def batch(length: int = S, seed: int = 1, samples: tuple[int, ...] = (4, 9)) -> tuple[Tensor, Where]:
    x = torch.randn(length, B, H, dtype=F64, generator=torch.Generator().manual_seed(seed))
    counted = torch.ones(length, B, dtype=torch.bool)
    counted[length - 2 :, 1] = False
    document, sample = torch.zeros(length, B, dtype=torch.int64), torch.tensor(samples)
    more = {"step": 3, "step_tokens": float(counted.sum()), "seed": 11}
    return x, place(sample, document, counted, torch.arange(length), NO_TP, **more)


def feed_forward(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    columns = [x @ weights[part].T + weights[f"{part}_bias"] for part in ("gate", "up") if part in weights]
    inner = reference.gated_unit(*columns, name) if name in GATED else reference.plain_unit(*columns, name)
    return inner @ weights["down"].T + weights["down_bias"]


def by_loop(part: Moe, x: Tensor, where: Where) -> Tensor:
    routing, name, y = part.router(x, where), part.experts.inner.activation, []
    shared = {key.replace(".weight", "").replace(".", "_"): p for key, p in part.shared.named_parameters()}
    for s in range(x.shape[0]):
        for b in range(B):
            of_token = (x[s, b] @ part.shared_gate.weight[0]).sigmoid() * feed_forward(shared, name, x[s, b])
            for k in range(routing.expert.shape[-1]):
                if routing.taken is None or routing.taken[s, b, k]:
                    of_expert = {key: p[routing.expert[s, b, k]] for key, p in part.experts.named_parameters()}
                    of_token = of_token + routing.weight[s, b, k] * feed_forward(of_expert, name, x[s, b])
            y.append(of_token)
    return torch.stack(y).view_as(x)


def pairs() -> list[object]:
    """Return every router with every activation; those on a diagonal by default, so that each comes up."""
    found = []
    for i, router in enumerate(ROUTERS):
        for j, activation in enumerate(ACTIVATIONS):
            rare = () if (i - j) % len(ROUTERS) == 0 else (pytest.mark.slow,)
            found.append(pytest.param(router, activation, marks=rare))
    return found


@pytest.mark.parametrize(("router", "activation"), pairs())
def test_a_token_is_the_weighted_sum_of_its_experts_and_its_gradient_agrees(router: str, activation: str) -> None:
    part, (x, where) = moe(router, Inner(activation, bias=True)), batch()
    x.requires_grad_()
    y, expected = part(x, where, None), by_loop(part, x, where)
    torch.testing.assert_close(y, expected)
    above = torch.randn_like(expected)
    of = [x, *(p for name, p in part.named_parameters())]
    found, wanted = (torch.autograd.grad(result, of, above, materialize_grads=True) for result in (y, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    small, fixed = x.detach()[:1].requires_grad_(), batch(1)[1].remembering()
    assert torch.autograd.gradcheck(lambda x: part(x, fixed, None), (small,))


@pytest.mark.parametrize("router", ROUTERS)
def test_tokens_one_after_the_other_give_the_evaluation_and_their_routing_is_recorded(router: str) -> None:
    part, (x, where) = moe(router, capacity_factor=0.0).eval(), batch()
    whole, routing = part(x, where, None), part.router(x, where)
    for training in (False, True):  # a step of decoding draws nothing and drops nothing whatever the mode
        part.train(training)
        state = part.initial_state(B, S)
        found = torch.cat([part.step(piece, state) for piece in x.split([1, 1, 3, 2])])
        torch.testing.assert_close(found, whole)
    experts, weights = state.read()
    k = routing.expert.shape[-1]
    taken = torch.ones_like(routing.expert, dtype=torch.bool) if routing.taken is None else routing.taken
    assert torch.equal(experts[..., :k], routing.expert.masked_fill(~taken, -1).int())
    assert not (experts[..., k:] != -1).any()
    torch.testing.assert_close(weights[..., :k], routing.weight)
    with pytest.raises(ValueError, match="the record of routing has room for 7 tokens, 8 are needed"):
        part.step(x[:1], state)


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "expert_choice"])
def test_every_router_of_tokens_knows_a_capacity_and_counts_what_it_drops(router: str) -> None:
    part, (x, where) = moe(router, capacity_factor=0.5), batch()
    tally = Tally(declared_entries(part))
    part(x, where, tally)
    sums = tally.reduce(single_process_mesh())
    assert sums["moe.load"].sum() == where.counted.sum() * top_k_of(router)
    assert sums["moe.dropped"] >= sums["moe.load"].sum() - E * sum(-(-n * top_k_of(router) // (2 * E)) for n in (7, 5))
    assert sums["moe.dropped"] > 0
    assert sums["moe.droppable"] == sums["moe.load"].sum()


def test_experts_that_choose_count_the_tokens_that_none_took() -> None:
    part, (x, where) = moe("expert_choice"), batch()
    tally = Tally(declared_entries(part))
    part(x, where, tally)
    sums, taken = tally.reduce(single_process_mesh()), part.router(x, where).taken
    assert sums["moe.load"].tolist() == [4 + 3] * E  # ceil(2 * 7 / 4) and ceil(2 * 5 / 4)
    assert sums["moe.dropped"] == (~taken.any(-1) & where.counted).sum()
    assert sums["moe.droppable"] == where.counted.sum()
    with pytest.raises(ValueError, match=r"capacity_factor = 1.0: experts that choose take .* leave it out"):
        moe("expert_choice", capacity_factor=1.0)


def test_dropout_in_experts_is_drawn_by_token_and_expert() -> None:
    part, (x, where) = moe(inner=Inner(dropout=0.4)), batch()
    y = part(x, where, None)
    assert torch.equal(part(x, where, None), y)
    some = batch(samples=(4, 8))[1]
    other = part(x, some, None)
    assert torch.equal(other[:, 0], y[:, 0])
    assert not torch.allclose(other[:, 1], y[:, 1])
    part.eval()
    still = part(x, where, None)
    assert not torch.allclose(still, y)
    part.train()
    mean = torch.stack([part(x, replace(where, step=step), None) for step in range(40)]).mean(0)
    assert (mean - still).abs().max() < 0.5 * still.abs().max()
    small, at = batch(1)
    assert torch.autograd.gradcheck(lambda x: part(x, at, None), (small.requires_grad_(),))


def test_dropout_of_a_feed_forward_needs_a_place_and_zeros_its_share() -> None:
    mlp, (x, where) = Mlp(H, 400, Inner("relu", dropout=0.25), init=INIT).double(), batch()
    initialise(mlp, seed=2)
    seen = []
    mlp.down.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    mlp(x, where)
    mlp.eval()(x, where)
    dropped, whole = seen
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)
    assert abs((kept.sum() / (whole != 0).sum()).item() - 0.75) < 0.02
    with pytest.raises(ValueError, match="dropout is drawn by the tokens' place: give `where`"):
        mlp.train()(x)
    assert torch.equal(mlp.step(x, None), mlp.eval()(x))


def test_a_plain_feed_forward_has_no_gate() -> None:
    assert [name for name, _ in Mlp(H, F, Inner("relu2", bias=True)).named_parameters()] == [
        "up.weight", "up.bias", "down.weight", "down.bias"
    ]  # fmt: skip
    assert [name for name, _ in Experts(H, F, E, Inner("gelu", bias=True)).named_parameters()] == [
        "up", "down", "up_bias", "down_bias"
    ]  # fmt: skip


def test_the_names_of_a_run_file_are_those_of_the_tables() -> None:
    assert set(FfnActivation.__args__) == set(ACTIVATIONS)
    assert {name for name, unit in ACTIVATIONS.items() if unit.is_gated} == GATED
    assert set(RouterKind.__args__) == set(ROUTERS)


def test_parts_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="a gate of the shared expert needs a shared expert"):
        Moe(make_router("softmax", H, E, 2), Experts(H, F, E), shared_gate=SharedGate(H))
    with pytest.raises(ValueError, match=r"expert dropout = 0.1 needs whole numbers exchanged: all_to_all would fit"):
        Experts(H, F, E, Inner(dropout=0.1), exchange=DeepEpExchange(E, NO_EP))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"router": "switch"}, 'top_k = 2: model.moe.router = "switch" sends a token to one expert; 1 would fit'),
        ({"router": "sinkhorn", "normalise_top_k": True}, "normalise_top_k = true: .* leave it out"),
        ({"router": "expert_choice", "capacity_factor": 1.0}, "capacity_factor = 1.0: .* leave it out"),
        ({"router": "noisy", "num_groups": 2}, "num_groups = 2: .* knows no groups"),
        ({"num_groups": 4}, r"num_groups = 4: must divide model.moe.num_experts = 6; one of \[1, 2, 3\] would fit"),
        ({"num_groups": 3, "top_groups": 4}, "top_groups = 4: must not exceed model.moe.num_groups = 3; 1 to 3 w"),
        ({"num_groups": 3, "top_groups": 4, "top_k": 5}, "top_groups = 4: must not exceed .*groups = 3; 3 would fit"),
        ({"num_groups": 4, "top_groups": 2, "top_k": 3}, r"must divide .*num_experts = 6; one of \[2, 3\] would fit"),
        ({"num_experts": 31, "num_groups": 31}, r"need 2; one of \[1\] would fit"),
        ({"num_experts": 31, "num_groups": 31, "top_groups": 2, "top_k": 3}, "1 would fit, with .*top_groups = 1"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups = 5: must not exceed model.moe.num_groups = 4; 1 to 4 would"),
        ({"router": "noisy", "top_groups": 2}, "top_groups = 2: .* knows no groups, .*; 1 would fit"),
        (
            {"num_groups": 6, "router": "sigmoid"},
            r"num_groups = 6: a group has 1 of .* need 2; one of \[1, 2, 3\] would fit",
        ),
        ({"num_shared_experts": 0, "shared_expert_gate": True}, "shared_expert_gate = true: weighs shared experts"),
    ],
)
def test_keys_that_a_router_has_no_use_for_are_told(keys: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        build_model(moe_config(**keys))


def test_what_is_left_out_is_as_the_router_was_published() -> None:
    switch = moe_config(router="switch", top_k=1).moe
    assert (switch.capacity_factor, switch.normalise_top_k) == (1.25, False)
    assert moe_config(router="switch", top_k=1, capacity_factor=0.0).moe.capacity_factor == 0.0
    assert moe_config(router="sigmoid").moe.normalise_top_k
    assert RouterLosses().load_balancing == "sequence"
