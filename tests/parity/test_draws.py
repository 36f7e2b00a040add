"""Dropout, jitter and capacity are the same in every layout, micro-batch and on recompute."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from engine_cases import Trace, assert_same, moe_config, train
from mixer_parity import where_of
from rank_pool import run_mesh
from torch import Tensor, nn

from meshwright.model.block import RECOMPUTED_WHOLE, RUN_AGAIN, Block
from meshwright.model.parts import build_model
from meshwright.parallel.apply import Plan
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.pipeline.orders import Stages
from meshwright.parallel.recompute.policy import Recompute
from meshwright.parallel.where import place, where_of_plain_tokens

CONFIGS = {
    "dropout": moe_config(residual_dropout=0.3),
    "jitter": moe_config(router_jitter=0.4),
    "capacity": moe_config(capacity_factor=0.75),
    "all": moe_config(residual_dropout=0.2, router_jitter=0.2, capacity_factor=0.75, load_balancing="step"),
}
TP, TP_EP = Sizes(tp=2), Sizes(tp=2, dp_shard=2, ep=2)


@cache
def definition(name: str) -> Trace:
    return train(single_process_mesh(), CONFIGS[name], Plan(), micro_batch=2)


def case(mesh: Mesh, name: str, plan: Plan, micro_batch: int) -> Trace:
    stages = Stages("gpipe", mesh.pp.size) if mesh.pp.is_split else None
    return train(mesh, CONFIGS[name], plan, micro_batch=micro_batch, stages=stages)


def assert_same_and_drops(trace: Trace, expected: Trace) -> None:
    assert_same(trace, expected)
    for ours, theirs in zip(trace.tallies, expected.tallies, strict=True):
        for key in (key for key in theirs if key.endswith("dropped")):
            assert ours[key] == theirs[key] != [0.0]


CP_TP = Sizes(cp=2, tp=2)
ALWAYS = [(Sizes(dp_shard=2, ep=2), "all")]
RARELY = [(sizes, name) for sizes in (CP_TP, TP_EP) for name in ("dropout", "jitter", "capacity")]
RARELY += [
    (sizes, "all")
    for sizes in (
        CP_TP,
        TP,
        TP_EP,
        Sizes(cp=3),
        Sizes(pp=2, dp_shard=2),
        Sizes(dp_shard=4, ep=2),
        Sizes(tp=2, dp_shard=2, etp=2),
        Sizes(cp=2, tp=2, ep=2, etp=2),
    )
]


@pytest.mark.parametrize(("sizes", "name"), ALWAYS)
def test_a_layout_draws_and_drops_what_one_process_does(sizes: Sizes, name: str) -> None:
    for trace in run_mesh(sizes, case, name, Plan(stage=1), 1):
        assert_same_and_drops(trace, definition(name))


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "name"), RARELY)
def test_every_other_layout_draws_and_drops_the_same(sizes: Sizes, name: str) -> None:
    for trace in run_mesh(sizes, case, name, Plan(stage=1), 2):
        assert_same_and_drops(trace, definition(name))


@pytest.mark.parametrize("name", ["dropout", "jitter", "capacity"])
def test_each_of_them_changes_the_result(name: str) -> None:
    plain = train(single_process_mesh(), moe_config(), Plan(), micro_batch=2, steps=1)
    assert definition(name).losses[0] != pytest.approx(plain.losses[0], rel=1e-9)


MODULES = {
    "whole": RECOMPUTED_WHOLE["mixer"] + RECOMPUTED_WHOLE["feedforward"],
    "remade": RUN_AGAIN["norm"],
}


@pytest.mark.parametrize(
    "plan",
    [Plan(recompute=Recompute("full")), Plan(recompute=Recompute("modules", **MODULES, offload=True))],
    ids=["full", "modules"],
)
def test_a_recomputed_pass_draws_and_drops_the_same(plan: Plan) -> None:
    trace, expected = train(single_process_mesh(), CONFIGS["all"], plan, micro_batch=2), definition("all")
    assert trace.losses == expected.losses
    assert trace.tallies == expected.tallies
    for name, value in expected.weights.items():
        assert torch.equal(trace.weights[name], value), name


@pytest.mark.slow
def test_micro_batches_draw_and_drop_the_same() -> None:
    assert_same_and_drops(train(single_process_mesh(), CONFIGS["all"], Plan(), micro_batch=8), definition("all"))


class Same(nn.Module):
    def forward(self, x: Tensor, *_rest: object) -> Tensor:
        return x


def masks(mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Return this rank's positions and what dropout leaves of ones."""
    block = Block(Same(), norm=Same(), residual_dropout=0.5, name="layers.3.mixer")
    document, counted = torch.zeros(8, 2, dtype=torch.int64), torch.ones(8, 2, dtype=torch.bool)
    where = place(torch.tensor([5, 6]), document, counted, torch.arange(8), mesh.tp, step=2, step_tokens=16.0, seed=9)
    return where.position, block(torch.ones(len(where.position), 2, 6), where, None)


def test_the_masks_of_split_tokens_are_bitwise_those_of_the_whole() -> None:
    _, whole = masks(single_process_mesh())
    assert {1.0, 3.0} == set(whole.unique().tolist())
    for position, part in run_mesh(TP, masks):
        assert torch.equal(part, whole[position])


SHARE = 0.25


@torch.no_grad()
def embedded(mesh: Mesh) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's positions and what its first layer takes in training, with dropout and without."""
    where = where_of(torch.zeros(12, 8, dtype=torch.int64), mesh)
    tokens = (torch.arange(12 * 8).view(12, 8) % 37)[where.position_mixed]
    configs = moe_config(embedding_dropout=SHARE), moe_config()
    dropping, plain = (build_model(config, mesh=mesh, dtype=torch.float64) for config in configs)
    whole = plain.train().begin(tokens, where)
    assert torch.equal(dropping.eval().begin(tokens, where), whole)
    return where.position, dropping.train().begin(tokens, where), whole


def test_a_share_of_the_embedded_features_is_dropped_in_training_the_same_in_every_layout() -> None:
    _, dropped, whole = embedded(single_process_mesh())
    gone = dropped == 0
    four_errors = 4 * (SHARE * (1 - SHARE) / gone.numel()) ** 0.5
    assert abs(gone.double().mean() - SHARE) < four_errors
    torch.testing.assert_close(dropped[~gone], whole[~gone] / (1 - SHARE))
    for position, part, _ in run_mesh(CP_TP, embedded):
        assert torch.equal(part, dropped[position])


DRAWS = {
    key: moe_config(**{key: 0.3})
    for key in ("residual_dropout", "ffn_dropout", "attention_dropout", "expert_dropout", "router_jitter")
} | {"noisy": moe_config(router="noisy")}


@pytest.mark.parametrize("name", DRAWS)
def test_layers_that_are_gone_through_again_draw_anew(name: str) -> None:
    model = build_model(DRAWS[name], dtype=torch.float64, seed=3).train()
    layer, tokens = model.layers["0"], torch.arange(24).view(12, 2) % 37
    where = where_of_plain_tokens(tokens)
    x = model.begin(tokens, where)
    first, second, again = (layer(x, where.of_lap(lap), None) for lap in (0, 1, 1))
    assert not torch.equal(first, second)
    assert torch.equal(second, again)


def test_a_model_that_does_not_train_draws_and_drops_nothing() -> None:
    tokens = torch.arange(24).view(12, 2) % 37
    where = where_of_plain_tokens(tokens)
    plain, other = (build_model(config).eval() for config in (moe_config(), CONFIGS["all"]))
    assert torch.equal(other(tokens, None, where), plain(tokens, None, where))
    assert not torch.equal(other.train()(tokens, None, where), plain(tokens, None, where))


COMPILED = """
import torch
from engine_cases import dense_config
from meshwright.model.parts import build_model
from meshwright.parallel.where import where_of_plain_tokens

tokens = torch.arange(24).view(12, 2) % 37
where = where_of_plain_tokens(tokens)
plain, other = (build_model(dense_config(num_layers=1, residual_dropout=0.2)) for _ in range(2))
other.layers["0"].forward = torch.compile(other.layers["0"].forward)
torch.testing.assert_close(other(tokens, tokens, where), plain(tokens, tokens, where))
print("the same")
"""


@pytest.mark.slow
def test_a_compiled_layer_draws_the_same() -> None:
    """In a process of its own, without the tests' type checks, which no compiler takes."""
    paths = [str(Path(__file__).parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "the same\n", done.stderr
