"""Capacity per sequence: a plain loop over tokens is the rule, and a plain loop over experts the result."""

import math

import engine_cases
import pytest
import torch
from rank_pool import run_mesh
from torch import Tensor

from meshwright.model.feedforward import moe as moe_module
from meshwright.model.feedforward.moe import Moe, RouterLosses
from meshwright.model.making import Making, Ways
from meshwright.model.parts import initialise
from meshwright.model.routers.capacity import capacity_of, within_capacity
from meshwright.parallel.experts import exchange
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.tally import Tally
from meshwright.parallel.where import Where, place

S, B, K, E, H = 17, 3, 2, 5, 8


def by_loop(expert: Tensor, counted: Tensor, position: Tensor, capacity: list[int]) -> Tensor:
    """Walk through each sequence in the order of positions; first come, first served."""
    taken = torch.zeros_like(expert, dtype=torch.bool)
    for b in range(expert.shape[1]):
        used = [0] * E
        for s in position.argsort().tolist():
            for k in range(expert.shape[2]):
                e = int(expert[s, b, k])
                if counted[s, b] and used[e] < capacity[b]:
                    taken[s, b, k] = True
                    used[e] += 1
    return taken


def some_choices(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return experts, each token's different ones and low ones preferred, what is counted, and positions."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(S, B, E, generator=generator) - torch.arange(E) * 0.15
    counted = torch.rand(S, B, generator=generator) > 0.25
    counted[:, 2] = False  # a sequence of padding
    return scores.topk(K, dim=-1).indices, counted, torch.randperm(S, generator=generator)


@pytest.mark.parametrize("factor", [0.2, 0.5, 1.0, 1.25, 3.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_expert_takes_what_a_loop_over_the_tokens_gives_it(factor: float, seed: int) -> None:
    expert, counted, position = some_choices(seed)
    capacity = capacity_of(counted.sum(0), factor, K, E)
    found = within_capacity(expert, counted, position, capacity, E)
    assert torch.equal(found, by_loop(expert, counted, position, capacity.tolist()))
    assert not found[~counted].any()
    if factor == 0.2:
        assert found.sum() < K * counted.sum()


def test_the_example_in_the_documentation() -> None:
    chosen = torch.tensor([0, 0, 1, 0, 0, 2, 0, 3])[:, None, None]
    capacity = capacity_of(torch.tensor([8]), 1.25, 1, 4)
    assert capacity.tolist() == [3]
    taken = within_capacity(chosen, torch.ones(8, 1, dtype=torch.bool), torch.arange(8), capacity, 4)
    assert (~taken).flatten().nonzero().flatten().tolist() == [4, 6]


def test_a_later_token_never_displaces_an_earlier_one() -> None:
    expert, counted, _ = some_choices(3)
    position, capacity = torch.arange(S), capacity_of(counted.sum(0), 0.5, K, E)
    before = within_capacity(expert, counted, position, capacity, E)
    for last in range(1, S):
        others = expert.clone()
        others[last:] = (expert[last:] + 1) % E
        assert torch.equal(within_capacity(others, counted, position, capacity, E)[:last], before[:last])


def test_the_capacity_is_exact() -> None:
    tokens = torch.tensor([0, 1, 5, 10, 999_983])
    assert capacity_of(tokens, 1.1, 2, 1).tolist() == [1, 3, 11, 22, 2_199_963]  # 1.1 * 2 * 5 is above 11 in floats
    assert capacity_of(tokens, 1.0, 8, 128).tolist() == [1, 1, 1, 1, math.ceil(999_983 / 16)]
    assert capacity_of(tokens, 1e-9, 1, 4).tolist() == [1] * 5


def built(factor: float, mesh: Mesh | None = None) -> Moe:
    config = engine_cases.moe_config(hidden_size=H, num_experts=E if mesh is None else 6, capacity_factor=factor)
    moe = moe_module.make(
        config, Making("layers.0", mesh or single_process_mesh(), InitPolicy(std=0.7), Ways())
    ).double()
    initialise(moe, seed=1)
    return moe


def batch() -> tuple[Tensor, Where]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(S, B, H, dtype=torch.float64, generator=generator)
    counted = torch.rand(S, B, generator=generator) > 0.2
    document = torch.zeros(S, B, dtype=torch.int64)
    tp = single_process_mesh().tp
    return x, place(torch.arange(B), document, counted, torch.arange(S), tp, step=0, step_tokens=float(counted.sum()))


def test_a_dropped_choice_adds_nothing_and_gets_no_gradient() -> None:
    x, where = batch()
    moe, plain = built(0.6), built(0.0)
    x.requires_grad_()
    tally = Tally(moe.tally_entries())
    y = moe(x, where, tally)

    routing = plain.router(x.flatten(0, 1))
    chosen = routing.expert.view(S, B, K)
    capacity = capacity_of(where.sequence_tokens, 0.6, K, E)
    taken = by_loop(chosen, where.counted, where.position, capacity.tolist())
    rows = []
    for t, token in enumerate(x.flatten(0, 1)):
        of_token = plain.shared(token[None])[0]
        for k in range(K):
            e = int(routing.expert[t, k])
            if taken.flatten(0, 1)[t, k]:
                inner = torch.nn.functional.silu(plain.experts.gate[e] @ token) * (plain.experts.up[e] @ token)
                of_token = of_token + routing.weight[t, k] * (plain.experts.down[e] @ inner)
        rows.append(of_token)
    expected = torch.stack(rows).view(S, B, H)

    torch.testing.assert_close(y, expected)
    dropped = where.counted[..., None] & ~taken
    assert 0 < dropped.sum() == tally.reduce(single_process_mesh())["layers.0.dropped"]
    above = torch.randn_like(y)
    moe.losses = RouterLosses()
    (of_x,) = torch.autograd.grad(moe(x, where, Tally(moe.tally_entries())), x, above, retain_graph=True)
    torch.testing.assert_close(of_x, torch.autograd.grad(expected, x, above, retain_graph=True)[0])
    moe(x, where, Tally(moe.tally_entries())).backward(above)
    expected.backward(above)
    for (name, ours), theirs in zip(moe.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_evaluation_and_generation_drop_nothing() -> None:
    x, where = batch()
    moe, plain = built(0.3).eval(), built(0.0).eval()
    assert torch.equal(moe(x, where, None), plain(x, where, None))
    assert torch.equal(moe.step(x, moe.initial_state(B, S)), plain.step(x, plain.initial_state(B, S)))
    assert not torch.equal(moe.train()(x, where, None), plain(x, where, None))


def rows_sent(mesh: Mesh) -> tuple[int, int]:
    """Return how many rows this rank's experts computed, and how many of its choices were taken."""
    moe = built(0.5, mesh)
    x, where = batch()
    part = slice(mesh.dp.rank, mesh.dp.rank + 1)
    counted, document = where.counted[:, part], where.document_whole[:, part]
    mine = place(where.sample[part], document, counted, where.position, mesh.tp, step=0, step_tokens=40.0)
    tally = Tally(moe.tally_entries())
    computed = []
    moe.experts.register_forward_pre_hook(lambda _module, args: computed.append(len(args[0])))
    moe(x[:, part], mine, tally)
    held = {name: view.clone() for name, view in tally._views.items()}
    return computed[0], int((held["layers.0.load"].sum() - held["layers.0.dropped"]).item())


def test_only_what_is_taken_is_sent_and_computed() -> None:
    answers = run_mesh(Sizes(dp_shard=2, ep=2), rows_sent)
    assert sum(computed for computed, _ in answers) == sum(taken for _, taken in answers) > 0


def test_an_exchange_in_which_a_rank_sends_nothing_gives_zeros() -> None:
    x = torch.randn(3, H, dtype=torch.float64, requires_grad=True)
    ep = single_process_mesh().ep
    nothing = torch.zeros(3, K, dtype=torch.bool)
    rows, plan = exchange.dispatch(x, torch.ones(3, K, dtype=torch.int64), E, ep, nothing)
    assert rows.shape == (0, H)
    assert plan.counts.tolist() == [0] * E
    y = exchange.combine(rows, torch.ones(3, K, dtype=torch.float64), plan, ep)
    y.sum().backward()
    assert not y.any()
    assert not x.grad.any()
