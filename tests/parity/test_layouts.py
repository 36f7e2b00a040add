"""Every layout computes what one process computes: losses, gradients, norms, router loads, weights."""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))

import pytest
import torch
from rank_pool import run_mesh
from training import Trace, dense_config, moe_config, train

from meshwright.parallel.apply import Plan
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh

CONFIGS = {
    "dense": dense_config(),
    "dense-tied-biased": dense_config(tie_embeddings=True, bias=("q", "k", "v", "output", "ffn")),
    "moe": moe_config(),
    "moe-step-balance": moe_config(load_balancing="step", bias=("ffn",), normalise_top_k=False),
}
_DEFINITION: dict[tuple[str, int], Trace] = {}


def definition(name: str, micro_batch: int) -> Trace:
    if (name, micro_batch) not in _DEFINITION:
        plan = Plan()
        _DEFINITION[name, micro_batch] = train(single_process_mesh(), CONFIGS[name], plan, micro_batch=micro_batch)
    return _DEFINITION[name, micro_batch]


def case(mesh: Mesh, name: str, plan: Plan, micro_batch: int) -> Trace:
    return train(mesh, CONFIGS[name], plan, micro_batch=micro_batch)


def assert_same(trace: Trace, expected: Trace) -> None:
    for name, value in expected.initial.items():
        assert torch.equal(trace.initial[name], value), f"initial {name} is not bitwise the same"
    # fp64 sums of a few thousand terms in another order: 1e-9 of each tensor's largest value (promise 2).
    assert trace.losses == pytest.approx(expected.losses, rel=1e-9)
    assert trace.norms == pytest.approx(expected.norms, rel=1e-9)
    for ours, theirs in zip(trace.tallies, expected.tallies, strict=True):
        for key, value in theirs.items():
            assert ours[key] == (value if key.endswith("load") else pytest.approx(value, rel=1e-9)), key
    for kind in ("gradients", "weights"):
        for name, value in getattr(expected, kind).items():
            error = (getattr(trace, kind)[name] - value).abs().max()
            assert error <= 1e-9 * value.abs().max(), f"{kind} of {name} differ by {error}"


LAYOUTS = [
    (Sizes(dp_shard=2), "dense"),
    (Sizes(dp_shard=4), "dense-tied-biased"),
    (Sizes(dp_shard=2), "moe"),
    (Sizes(dp_shard=2, ep=2), "moe"),
    (Sizes(dp_shard=4, ep=2), "moe"),
    (Sizes(dp_shard=4, ep=4), "moe-step-balance"),
]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("sizes", "name"), LAYOUTS)
def test_a_layout_computes_what_one_process_computes(sizes: Sizes, name: str, stage: int) -> None:
    expected = definition(name, 1)
    for trace in run_mesh(sizes, case, name, Plan(stage=stage), 1):
        assert_same(trace, expected)


@pytest.mark.parametrize("name", ["dense", "moe", "moe-step-balance"])
def test_micro_batches_do_not_change_the_result(name: str) -> None:
    assert_same(train(single_process_mesh(), CONFIGS[name], Plan(), micro_batch=4), definition(name, 1))


@pytest.mark.parametrize(
    "plan",
    [
        Plan(recompute="full"),
        Plan(recompute="full", recompute_every=2),
        Plan(recompute="selective", recompute_save=("matmul",)),
    ],
)
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_recompute_does_not_change_the_result(plan: Plan, name: str) -> None:
    assert_same(train(single_process_mesh(), CONFIGS[name], plan), definition(name, 1))


@pytest.mark.parametrize("stage", [1, 3])
def test_recompute_and_zero_and_expert_parallel_stand_together(stage: int) -> None:
    plan = Plan(stage=stage, recompute="full")
    for trace in run_mesh(Sizes(dp_shard=4, ep=2), case, "moe", plan, 2):
        assert_same(trace, definition("moe", 1))
