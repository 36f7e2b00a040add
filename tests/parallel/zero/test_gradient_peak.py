"""The most gradients that live at once in a step are, to the byte, those that `check` counts.

The second of two steps is looked at, which finds what the first left. The models' sizes divide by two, so that averages
are exact. Less is found only where a stage of a pipeline is reduced when the schedule is through: when the largest unit
is copied, of those before it only parts are left. They are written down by hand, in numbers; the order is that in which
FSDP2 knows them: around the layers first, then layers, each before its experts.
"""

import pytest
import torch
from gradient_bytes import Found, most_in_a_step
from parity_samples import Sample, sample
from rank_pool import run_mesh

from meshwright.kernels.limits import USUAL, Limits
from meshwright.launcher.build import held_dtype, sizes_of
from meshwright.launcher.runfile.footprint import state_of_rank
from meshwright.launcher.stages import stages_of

# Numbers of the two models of width 22.
EMBEDDING, HEAD, DENSE_OF_MOE_LAYER, ROUTER_AND_NORM = 38 * 22, 38 * 22 + 22, 3136, 8 * 22 + 22
LAYER = {"dense-by-two": 5060, "moe-by-two": 13696}


def found_on(drawn: Sample, precision: str, limits: Limits = USUAL) -> list[Found]:
    assert drawn.problems() == []
    return run_mesh(sizes_of(drawn.run_file(), drawn.world), most_in_a_step, drawn, precision, limits)


def drawn_as(model: str, stage: int, schedule: str, **changes: int) -> Sample:
    """Return a layout of two ranks that share state; "none" is no pipeline."""
    if schedule != "none":
        # As many micro-batches as fill it: with fewer a stage is reduced before another has all of its gradients.
        few = schedule in ("1f1b", "gpipe")
        return sample(
            model,
            dp_shard=2,
            zero__stage=stage,
            micro_batch=2 if few else 1,
            pp=2,
            pipeline__schedule=schedule,
            **changes,
        )
    return sample(model, dp_shard=2, zero__stage=stage, micro_batch=2, **changes)


def has_cut_experts(drawn: Sample) -> bool:
    return drawn.model.startswith("moe") and not drawn.has("ep")


def reduced_before(drawn: Sample, rank: int) -> int:
    """Return how many numbers a stage's rank has reduced when the largest unit is copied, at the end of a schedule."""
    dense = DENSE_OF_MOE_LAYER if has_cut_experts(drawn) else 0
    return dense + (HEAD if rank < 2 else 0)  # the last stage is reduced first, which in a V is the first rank's


def assert_counted(drawn: Sample, precision: str) -> None:
    run_file = drawn.run_file()
    stage, compute = run_file.zero.stage, 2 if precision == "bf16" else 4
    is_apart, is_pipelined = stages_of(run_file).splits_backward, drawn.has("pp")
    for rank, one in enumerate(found_on(drawn, precision)):
        less = 0
        if stage >= 2 and is_apart:
            less = reduced_before(drawn, rank) * 4 // 2  # half of it is a part that stays: 4 bytes, over two ranks
        elif stage >= 2 and has_cut_experts(drawn):
            less = ROUTER_AND_NORM * compute  # counted, and not there yet when the experts' gradients all are
        elif stage >= 2 and drawn.has("ep"):
            # FSDP2 has reduced one parameter more or less when the last gradient of an expert arrives.
            assert 0 <= one.counted.gradients - one.gradients <= ROUTER_AND_NORM * compute, f"rank {rank}"
            continue
        assert one.gradients + less == one.counted.gradients, f"rank {rank}"
        if stage == 2 and not drawn.has("ep"):
            assert one.gathered == one.counted.weights, f"rank {rank}"
        if stage == 3 and not drawn.has("ep"):
            around = HEAD + EMBEDDING if not is_pipelined else EMBEDDING if rank < 2 else HEAD
            assert one.gathered == (around + LAYER[drawn.model]) * compute, f"rank {rank}"


QUICK = [
    (1, "none"), (3, "none"), (1, "1f1b"), (2, "1f1b"), (0, "zbv"), (1, "zbv"), (2, "zbv"),
]  # fmt: skip
SLOW = [
    (0, "none"),
    (2, "none"),
    (0, "1f1b"),
    (3, "1f1b"),
    (2, "gpipe"),
    (3, "interleaved_1f1b"),
    (1, "interleaved_zero_bubble"),
]


@pytest.mark.parametrize(
    ("stage", "schedule"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_a_step_holds_the_gradients_that_are_counted(stage: int, schedule: str) -> None:
    assert_counted(drawn_as("dense-by-two", stage, schedule), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["none", "gpipe"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_in_bf16_count_half(stage: int, schedule: str) -> None:
    assert_counted(drawn_as("dense-by-two", stage, schedule), "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_of_experts_are_counted_where_they_lie(stage: int, ep: int, precision: str) -> None:
    """With ep = 2 each expert lives on one rank: its gradients are in buckets whatever the stage."""
    assert_counted(drawn_as("moe-by-two", stage, "none", **({"ep": ep} if ep > 1 else {})), precision)


@pytest.mark.slow
@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize(
    ("stage", "schedule"), [(1, "gpipe"), (2, "gpipe"), (3, "gpipe"), (0, "zbv"), (1, "zbv"), (2, "zbv")]
)
def test_gradients_of_experts_are_counted_under_a_pipeline(stage: int, schedule: str, ep: int) -> None:
    assert_counted(drawn_as("moe-by-two", stage, schedule, **({"ep": ep} if ep > 1 else {})), "fp32")


def test_of_several_buckets_one_is_made_beside_the_gradients_that_fill_it() -> None:
    """Not all of them, which is what one bucket takes; a bucket is full at its limit or up to a parameter later."""
    limits, drawn = Limits(bucket_bytes=10_000), drawn_as("dense-by-two", 1, "zbv")
    largest = 52 * 22 * 4
    for several, one in zip(found_on(drawn, "fp32", limits), found_on(drawn, "fp32"), strict=True):
        assert several.counted.gradients - largest <= several.gradients <= several.counted.gradients
        assert several.gradients < one.gradients


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_summed_over_copies_is_counted(stage: int) -> None:
    drawn = sample("dense-by-two", dp_replicate=2, dp_shard=2, zero__stage=stage, micro_batch=1)
    for one in found_on(drawn, "fp32"):
        assert one.gradients == one.counted.gradients


def test_autocast_counts_as_fp32() -> None:
    """Weights, and so gradients, are in fp32 whatever products are computed in."""
    drawn = drawn_as("dense-by-two", 1, "none")
    as_fp32, cast = (
        state_of_rank(drawn.run_file(precision=precision), 2, 0) for precision in ("fp32", "bf16_autocast")
    )
    assert cast == as_fp32
    assert torch.promote_types(held_dtype(drawn.run_file(precision="bf16_autocast")), torch.bfloat16) == torch.float32
