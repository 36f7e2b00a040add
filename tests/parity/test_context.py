"""Samples spread along cp train like samples on one process, with their documents masked, beside every other axis."""

from functools import cache

import pytest
from engine_cases import Samples, Trace, assert_same, dense_config, moe_config, train
from rank_pool import run_mesh

from meshwright.parallel.apply import Plan
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.pipeline.orders import Stages
from meshwright.parallel.recompute.policy import Recompute

CONFIGS = {
    "dense": dense_config(),
    "moe": moe_config(num_experts=4, expert_hidden_size=18),
    "draws": moe_config(num_experts=4, residual_dropout=0.2, router_jitter=0.2, capacity_factor=0.75),
    "mqa": dense_config(num_kv_heads=1),
}


@cache
def definition(name: str, mask_documents: bool) -> Trace:
    samples = Samples(mask_documents=mask_documents)
    return train(single_process_mesh(), CONFIGS[name], Plan(), micro_batch=2, samples=samples)


def case(mesh: Mesh, name: str, plan: Plan, context: str, mask_documents: bool) -> Trace:
    stages = Stages("1f1b", mesh.pp.size) if mesh.pp.is_split else None
    samples = Samples(context, mask_documents)
    return train(mesh, CONFIGS[name], plan, micro_batch=2, stages=stages, samples=samples)


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("sizes", "name", "stage", "context"),
    [
        (Sizes(cp=2), "dense", 0, "ring"),
        (Sizes(cp=2), "mqa", 1, "ulysses"),
        slow(Sizes(cp=2, tp=2), "moe", 1, "ring"),
        slow(Sizes(cp=2, tp=2), "dense", 0, "ulysses"),
        slow(Sizes(cp=2, tp=2, ep=2, etp=2), "moe", 2, "ulysses"),
        slow(Sizes(cp=2, ep=2), "moe", 0, "ring"),
        slow(Sizes(cp=3), "moe", 0, "ring"),
        slow(Sizes(cp=2, dp_shard=2, ep=4), "moe", 1, "ring"),
        slow(Sizes(cp=2, dp_shard=2), "dense", 2, "ulysses"),
        slow(Sizes(cp=2, dp_shard=2), "dense", 3, "ring"),
        slow(Sizes(cp=2, dp_replicate=2, ep=2), "moe", 1, "ring"),
        slow(Sizes(cp=2, dp_shard=2, tp=2, ep=2), "moe", 3, "ring"),
        slow(Sizes(cp=2, tp=2, ep=2), "draws", 1, "ring"),
        slow(Sizes(pp=2, cp=2), "moe", 1, "ring"),
        slow(Sizes(pp=2, cp=2, tp=2), "dense", 2, "ulysses"),
    ],
)
def test_spread_samples_train_like_whole_ones(sizes: Sizes, name: str, stage: int, context: str) -> None:
    for trace in run_mesh(sizes, case, name, Plan(stage=stage), context, True):
        assert_same(trace, definition(name, True))


@pytest.mark.slow
@pytest.mark.parametrize("plan", [Plan(), Plan(recompute=Recompute("full")), Plan(recompute=Recompute("selective"))])
def test_without_masks_and_recomputed_the_result_is_the_same(plan: Plan) -> None:
    for trace in run_mesh(Sizes(cp=2), case, "moe", plan, "ring", False):
        assert_same(trace, definition("moe", False))


def test_the_masks_matter() -> None:
    assert definition("dense", True).losses != pytest.approx(definition("dense", False).losses, rel=1e-4)
