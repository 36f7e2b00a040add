"""Every schedule computes what one process computes, alone and together with the other axes."""

from datetime import timedelta
from functools import cache
from unittest.mock import patch

import pytest
from engine_cases import Trace, assert_same, dense_config, forward_backward, moe_config, start, train
from rank_pool import run_mesh

from meshwright.kernels.limits import Limits
from meshwright.launcher.build import recompute_of
from meshwright.parallel.apply import Plan
from meshwright.parallel.config import ZERO_BUBBLE, RecomputeConfig
from meshwright.parallel.mesh import Mesh, Sizes, build_mesh, single_process_mesh
from meshwright.parallel.pipeline.orders import Stages
from meshwright.parallel.recompute.policy import Recompute

CONFIGS = {
    "dense": dense_config(num_layers=4),
    "tied": dense_config(num_layers=4, tie_embeddings=True, bias=("q", "k", "v", "output", "ffn")),
    "moe": moe_config(num_layers=4, num_experts=4, load_balancing="step"),
    "moe-tied": moe_config(num_layers=4, tie_embeddings=True),
    "deep": moe_config(num_layers=8, tie_embeddings=True),
    "further": dense_config(num_layers=4, multi_token={"depth": 2, "loss_weight": 0.5}),
    "further of experts": moe_config(num_layers=4, multi_token={"depth": 1, "loss_weight": 0.5}),
    "further, tied": dense_config(num_layers=4, tie_embeddings=True, multi_token={"depth": 2, "loss_weight": 0.5}),
}
SCHEDULES = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved_1f1b": 2,
    "interleaved_zero_bubble": 2,
    "zbv": 2,
    "dualpipev": 2,
}
# What a schedule that splits backwards may run again.
MADE_AGAIN = recompute_of(RecomputeConfig(mode="modules", modules=("norm", "activation")))
TWO, TWO_BY_TWO, FOUR = Sizes(pp=2), Sizes(pp=2, dp_shard=2), Sizes(pp=4)
TWO_BY_EP, TWO_BY_TP = Sizes(pp=2, dp_shard=2, ep=2), Sizes(pp=2, tp=2)


@cache
def definition(name: str) -> Trace:
    return train(single_process_mesh(), CONFIGS[name], Plan(), micro_batch=2)


def case(mesh: Mesh, name: str, schedule: str, plan: Plan, micro_batch: int) -> Trace:
    stages = Stages(schedule, mesh.pp.size, SCHEDULES[schedule])
    return train(mesh, CONFIGS[name], plan, micro_batch=micro_batch, stages=stages)


def assert_like_one_process(sizes: Sizes, name: str, schedule: str, plan: Plan, micro_batch: int = 1) -> None:
    for trace in run_mesh(sizes, case, name, schedule, plan, micro_batch):
        assert trace.initial.keys() == definition(name).initial.keys()
        assert trace.tallies[0].keys() == definition(name).tallies[0].keys()
        assert_same(trace, definition(name))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_computes_what_one_process_computes(schedule: str) -> None:
    assert_like_one_process(TWO, "moe-tied", schedule, Plan())


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["dense", "tied", "moe"])
def test_every_schedule_does_for_every_kind_of_model(schedule: str, name: str) -> None:
    assert_like_one_process(TWO, name, schedule, Plan())


FURTHER = [(name, schedule) for name in ("further", "further of experts") for schedule in SCHEDULES]
FURTHER += [("further, tied", schedule) for schedule in SCHEDULES if schedule not in ZERO_BUBBLE]
QUICK_FURTHER = [("further", "1f1b"), ("further", "zbv")]


@pytest.mark.parametrize(
    ("name", "schedule"),
    [pytest.param(*one, marks=() if one in QUICK_FURTHER else pytest.mark.slow) for one in FURTHER],
)
def test_further_tokens_are_predicted_in_the_last_stage(name: str, schedule: str) -> None:
    assert_like_one_process(TWO, name, schedule, Plan())


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ZERO_BUBBLE)
def test_a_split_backward_breaks_for_further_tokens_of_a_tied_embedding(schedule: str) -> None:
    """What the check refuses is so: if torch mends it, the refusal goes."""
    with pytest.raises(BaseException, match="backward through the graph a second time"):
        assert_like_one_process(TWO, "further, tied", schedule, Plan())


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_does_on_four_stages_or_more(schedule: str) -> None:
    assert_like_one_process(FOUR, "deep", schedule, Plan())


# A reduction after the schedule, and FSDP2's; all stages of ZeRO under each schedule are slow.
USUAL = [("zbv", 1), ("interleaved_1f1b", 3)]
ZERO = [(schedule, stage) for schedule in SCHEDULES for stage in (0, 1, 2)]
ZERO += [("gpipe", 3), ("1f1b", 3), ("interleaved_1f1b", 3)]


@pytest.mark.parametrize(("schedule", "stage"), USUAL)
def test_state_is_sharded_within_the_stages(schedule: str, stage: int) -> None:
    assert_like_one_process(TWO_BY_TWO, "moe-tied", schedule, Plan(stage=stage))


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "stage"), [one for one in ZERO if one not in USUAL])
def test_every_stage_of_zero_does_under_every_schedule(schedule: str, stage: int) -> None:
    assert_like_one_process(TWO_BY_TWO, "moe-tied", schedule, Plan(stage=stage))


@pytest.mark.parametrize(
    ("sizes", "schedule", "plan"),
    [
        (TWO_BY_EP, "1f1b", Plan(stage=3)),
        pytest.param(TWO_BY_EP, "zbv", Plan(stage=2), marks=pytest.mark.slow),
        pytest.param(TWO_BY_EP, "interleaved_zero_bubble", Plan(stage=1), marks=pytest.mark.slow),
        pytest.param(TWO_BY_EP, "dualpipev", Plan(), marks=pytest.mark.slow),
        pytest.param(TWO_BY_TP, "dualpipev", Plan(), marks=pytest.mark.slow),
        pytest.param(TWO_BY_TP, "1f1b", Plan(), marks=pytest.mark.slow),
        pytest.param(TWO_BY_TP, "zbv", Plan(), marks=pytest.mark.slow),
        pytest.param(Sizes(pp=2, dp_replicate=2), "1f1b", Plan(stage=1), marks=pytest.mark.slow),
        pytest.param(Sizes(pp=2, dp_shard=2, tp=2, ep=2), "interleaved_1f1b", Plan(stage=2), marks=pytest.mark.slow),
    ],
)
def test_experts_and_split_layers_stand_within_stages(sizes: Sizes, schedule: str, plan: Plan) -> None:
    assert_like_one_process(sizes, "moe-tied", schedule, plan)


@pytest.mark.parametrize(
    ("schedule", "plan"),
    [
        ("1f1b", Plan(recompute=Recompute("full"))),
        pytest.param("interleaved_1f1b", Plan(recompute=Recompute("full"), stage=3), marks=pytest.mark.slow),
        pytest.param("gpipe", Plan(recompute=Recompute("selective", save=("attention",))), marks=pytest.mark.slow),
        pytest.param("zbv", Plan(recompute=MADE_AGAIN), marks=pytest.mark.slow),
    ],
)
def test_recompute_stands_within_stages(schedule: str, plan: Plan) -> None:
    sizes = TWO_BY_TWO if plan.stage else TWO
    assert_like_one_process(sizes, "moe-tied", schedule, plan)


def test_micro_batches_of_several_samples_and_small_buckets_change_nothing() -> None:
    plan = Plan(stage=1, limits=Limits(bucket_bytes=2000))
    for trace in run_mesh(TWO, case, "moe-tied", "1f1b", plan, 4):
        assert_same(trace, definition("moe-tied"))


def fault_of_a_step(mesh: Mesh, schedule: str, plan: Plan, splits_backward: bool) -> str:
    """Run one step; what the engine is told of the schedule may be wrong."""
    stages = Stages(schedule, mesh.pp.size, SCHEDULES[schedule])
    with patch.object(Stages, "splits_backward", splits_backward):
        run = start(mesh, CONFIGS["dense"], plan, stages=stages)
    try:
        forward_backward(run, 0, 1)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv", "dualpipev"])
def test_gradients_that_no_hook_is_called_for_are_missed_at_once(schedule: str) -> None:
    # torch writes the weights' gradients past AccumulateGrad: taken by hooks, some of the eight never come.
    found = run_mesh(TWO, fault_of_a_step, schedule, Plan(), False)
    assert any("of 8 gradients in this step" in text or "got no gradient" in text for text in found), found
    assert run_mesh(TWO, fault_of_a_step, schedule, Plan(), True) == ["", ""]


def outcome_under_zero(mesh: Mesh, schedule: str, stage: int) -> str:
    """Run one step; a rank that waits for one that failed gives up soon."""
    try:
        return fault_of_a_step(build_mesh(mesh.sizes, timedelta(seconds=10)), schedule, Plan(stage=stage), True)
    except RuntimeError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv"])
def test_zero_3_breaks_where_the_backward_is_split(schedule: str) -> None:
    # Why the run file's checks refuse the two together; ZeRO-2 keeps the weights gathered and loses nothing.
    assert run_mesh(TWO_BY_TWO, outcome_under_zero, schedule, 2) == [""] * 4
    assert any(run_mesh(TWO_BY_TWO, outcome_under_zero, schedule, 3))
