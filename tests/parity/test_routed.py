"""Routers times feed-forwards: what one process computes, every layout computes, draws and choices bit for bit."""

from functools import cache

import pytest
from engine_cases import Trace, assert_same, moe_config, train
from part_samples import ROUTER_KEYS
from rank_pool import run_mesh

from meshwright.model.config import ModelConfig
from meshwright.model.kinds.feedforward.mlp import FfnActivation
from meshwright.model.kinds.feedforward.moe import RouterKind
from meshwright.parallel.apply import Plan
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.recompute.policy import Recompute

ROUTERS = list(RouterKind.__args__)
ACTIVATIONS = list(FfnActivation.__args__)
TP, CP, EP, ETP = Sizes(tp=2), Sizes(cp=2), Sizes(dp_shard=2, ep=2), Sizes(dp_shard=2, etp=2)
ALL = Sizes(cp=2, tp=2, ep=2, etp=2)


def config_of(router: str, activation: str) -> ModelConfig:
    keys = {"router": router, "ffn_activation": activation, "ffn_dropout": 0.1, "bias": ("ffn",), **ROUTER_KEYS[router]}
    return moe_config(pattern="*E", num_layers=1, **keys)


def train_routed(mesh: Mesh, router: str, activation: str, plan: Plan, micro_batch: int, steps: int = 2) -> Trace:
    return train(mesh, config_of(router, activation), plan, micro_batch=micro_batch, steps=steps)


@cache
def definition(router: str, activation: str, steps: int) -> Trace:
    return train_routed(single_process_mesh(), router, activation, Plan(), 2, steps)


def assert_layout(sizes: Sizes, router: str, activation: str, plan: Plan, steps: int = 2) -> None:
    expected = definition(router, activation, steps)
    for trace in run_mesh(sizes, train_routed, router, activation, plan, 1, steps):
        assert_same(trace, expected)
        for ours, theirs in zip(trace.tallies, expected.tallies, strict=True):
            for name in (name for name in theirs if name.rpartition(".")[2] in ("load", "dropped", "passed")):
                assert ours[name] == theirs[name], name


# Default: the two that need whole sequences; slow: the whole product, each pair on one of the layouts.
DEFAULT = [(TP, "expert_choice", "swiglu"), (CP, "sinkhorn", "geglu")]
PRODUCT = [
    ((TP, CP, EP, ETP)[(i + j) % 4], router, activation)
    for i, router in enumerate(ROUTERS)
    for j, activation in enumerate(ACTIVATIONS)
]


@pytest.mark.parametrize(("sizes", "router", "activation"), DEFAULT)
def test_a_router_and_a_feed_forward_give_the_same_in_a_layout(sizes: Sizes, router: str, activation: str) -> None:
    assert_layout(sizes, router, activation, Plan())


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "router", "activation"), PRODUCT)
def test_every_router_with_every_feed_forward_gives_the_same_in_some_layout(
    sizes: Sizes, router: str, activation: str
) -> None:
    assert_layout(sizes, router, activation, Plan(), steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["sigmoid", "expert_choice"])
def test_a_router_gives_the_same_over_all_axes_and_when_it_is_recomputed(router: str) -> None:
    assert_layout(ALL, router, "swiglu", Plan(recompute=Recompute("full")))
