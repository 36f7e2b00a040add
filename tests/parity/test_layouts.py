"""Every layout computes what one process computes: losses, gradients, norms, router loads, weights."""

from functools import cache

import pytest
import torch
from engine_cases import Trace, assert_same, dense_config, moe_config, train
from rank_pool import run_mesh

from meshwright.kernels.limits import Limits
from meshwright.parallel.apply import Plan
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.recompute.policy import Recompute

CONFIGS = {
    "dense": dense_config(),
    "dense-tied-biased": dense_config(tie_embeddings=True, bias=("q", "k", "v", "output", "ffn")),
    "moe": moe_config(),
    "moe-step-balance": moe_config(num_experts=4, load_balancing="step", bias=("ffn",), normalise_top_k=False),
}
TWO, TWO_EP, FOUR, FOUR_EP2, FOUR_EP4 = (
    Sizes(dp_shard=2),
    Sizes(dp_shard=2, ep=2),
    Sizes(dp_shard=4),
    Sizes(dp_shard=4, ep=2),
    Sizes(dp_shard=4, ep=4),
)


@cache
def definition(name: str) -> Trace:
    return train(single_process_mesh(), CONFIGS[name], Plan(), micro_batch=2)


def case(mesh: Mesh, name: str, plan: Plan, micro_batch: int) -> Trace:
    return train(mesh, CONFIGS[name], plan, micro_batch=micro_batch)


USUAL = [
    (TWO, "dense", 0),
    (TWO_EP, "moe", 2),
    (FOUR, "dense-tied-biased", 3),
    (FOUR_EP2, "moe", 1),
    (FOUR_EP4, "moe-step-balance", 1),
]
ALL = [
    (sizes, name, stage)
    for sizes, name in [
        (TWO, "dense"),
        (FOUR, "dense-tied-biased"),
        (TWO, "moe"),
        (TWO_EP, "moe"),
        (FOUR_EP2, "moe"),
        (FOUR_EP4, "moe-step-balance"),
        (Sizes(dp_shard=8, ep=4), "moe-step-balance"),
    ]
    for stage in range(4)
]


@pytest.mark.parametrize(("sizes", "name", "stage"), USUAL)
def test_a_layout_computes_what_one_process_computes(sizes: Sizes, name: str, stage: int) -> None:
    for trace in run_mesh(sizes, case, name, Plan(stage=stage), 1):
        assert_same(trace, definition(name))


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "name", "stage"), [layout for layout in ALL if layout not in USUAL])
def test_every_other_layout_computes_the_same(sizes: Sizes, name: str, stage: int) -> None:
    for trace in run_mesh(sizes, case, name, Plan(stage=stage), 1):
        assert_same(trace, definition(name))


def in_fp32(mesh: Mesh, name: str, stage: int) -> Trace:
    return train(mesh, CONFIGS[name], Plan(stage=stage), dtype=torch.float32)


@pytest.mark.parametrize(("sizes", "stage"), [(TWO, 3), pytest.param(FOUR_EP2, 3, marks=pytest.mark.slow)])
def test_fp32_agrees_up_to_the_order_of_its_sums(sizes: Sizes, stage: int) -> None:
    # Reductions go other ways in fp32 than in fp64, FSDP2's too. Weights are not compared: AdamW divides a gradient by
    # its own size, so that one whose true value is 0 (of a k bias) moves its weight by chance.
    expected = in_fp32(single_process_mesh(), "moe", 0)
    for trace in run_mesh(sizes, in_fp32, "moe", stage):
        assert trace.losses == pytest.approx(expected.losses, rel=1e-5)
        assert trace.norms == pytest.approx(expected.norms, rel=1e-5)
        for name, value in expected.gradients.items():
            error = (trace.gradients[name] - value).abs().max()
            assert error <= 1e-5 * value.abs().max(), f"gradients of {name} differ by {error}"


@pytest.mark.parametrize(
    ("sizes", "stage"),
    [
        pytest.param(Sizes(dp_replicate=2, dp_shard=2, ep=2), 0, marks=pytest.mark.slow),
        (Sizes(dp_replicate=2, dp_shard=2, ep=2), 1),
        (Sizes(dp_replicate=2), 1),
    ],
)
def test_copies_of_the_sharded_state_change_nothing(sizes: Sizes, stage: int) -> None:
    for trace in run_mesh(sizes, case, "moe", Plan(stage=stage), 1):
        assert_same(trace, definition("moe"))


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_many_small_buckets_change_nothing(stage: int) -> None:
    for trace in run_mesh(TWO_EP, case, "moe", Plan(stage=stage, limits=Limits(bucket_bytes=2000)), 2):
        assert_same(trace, definition("moe"))


@pytest.mark.parametrize(("name", "micro_batch"), [("dense", 8), ("moe", 1), ("moe-step-balance", 8)])
def test_micro_batches_do_not_change_the_result(name: str, micro_batch: int) -> None:
    assert_same(train(single_process_mesh(), CONFIGS[name], Plan(), micro_batch=micro_batch), definition(name))


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("dense", Plan(recompute=Recompute("full", every=2))),
        ("moe", Plan(recompute=Recompute("full"))),
        ("moe", Plan(recompute=Recompute("selective", save=("attention", "matmul")))),
    ],
)
def test_recompute_does_not_change_the_result(name: str, plan: Plan) -> None:
    assert_same(train(single_process_mesh(), CONFIGS[name], plan, micro_batch=4), definition(name))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_recompute_and_zero_and_expert_parallel_stand_together(stage: int) -> None:
    plan = Plan(stage=stage, recompute=Recompute("full"))
    for trace in run_mesh(FOUR_EP2, case, "moe", plan, 2):
        assert_same(trace, definition("moe"))


def twice(mesh: Mesh, stage: int) -> bool:
    first, second = (case(mesh, "moe", Plan(stage=stage), 1) for _ in range(2))
    same = first.losses == second.losses and first.norms == second.norms and first.tallies == second.tallies
    return same and all(torch.equal(first.weights[name], value) for name, value in second.weights.items())


def test_the_same_layout_twice_is_bitwise_the_same() -> None:
    assert run_mesh(TWO_EP, twice, 1) == [True, True]
