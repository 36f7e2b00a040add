"""On paper every schedule ends, in the time that its authors say; a table that cannot end is found out."""

import pytest

from meshwright.parallel.pipeline.orders import Action, Stages, orders_of
from meshwright.parallel.pipeline.simulate import DeadlockError, predict, simulate

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 3)]
SCHEDULES += [("interleaved_zero_bubble", 2), ("interleaved_zero_bubble", 3), ("zbv", 2), ("dualpipev", 2)]


@pytest.mark.parametrize(("schedule", "per_rank"), SCHEDULES)
def test_no_schedule_deadlocks_for_any_ranks_and_micro_batches(schedule: str, per_rank: int) -> None:
    for ranks in (2, 3, 4, 5, 8):
        stages = Stages(schedule, ranks, per_rank)
        for micro_batches in [n for n in range(1, 4 * ranks + 2) if stages.takes(n)]:
            found = predict(stages, micro_batches)
            assert 0.0 <= found.bubble < 1.0
            assert max(found.in_flight) <= micro_batches * per_rank


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (4, 8), (4, 32), (8, 16)])
def test_the_bubble_of_plain_schedules_is_the_textbooks(schedule: str, ranks: int, micro_batches: int) -> None:
    found = predict(Stages(schedule, ranks), micro_batches)
    assert found.time == 3 * (micro_batches + ranks - 1)
    assert found.bubble == pytest.approx((ranks - 1) / (micro_batches + ranks - 1))


@pytest.mark.parametrize("per_rank", [2, 4])
def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank(per_rank: int) -> None:
    # Narayanan et al. 2021: (ranks - 1) / (stages of a rank * micro-batches) of the useful time.
    found = predict(Stages("interleaved_1f1b", 4, per_rank), 16)
    assert found.bubble / (1 - found.bubble) == pytest.approx(3 / (per_rank * 16))


def test_zero_bubble_schedules_wait_less() -> None:
    bubbles = {schedule: predict(Stages(schedule, 4, per_rank), 16).bubble for schedule, per_rank in SCHEDULES}
    assert bubbles["1f1b"] > bubbles["interleaved_1f1b"] > bubbles["interleaved_zero_bubble"]
    assert bubbles["zbv"] == pytest.approx(3 / 99)  # only until the last rank has its first micro-batch
    assert bubbles["dualpipev"] == bubbles["zbv"]


def test_1f1b_holds_as_many_activations_as_stages_follow_and_gpipe_all() -> None:
    assert predict(Stages("1f1b", 4), 16).in_flight == (4, 3, 2, 1)
    assert predict(Stages("gpipe", 4), 16).in_flight == (16, 16, 16, 16)
    assert predict(Stages("zbv", 4, 2), 16).in_flight == (8, 8, 8, 8)


def test_times_are_those_counted_by_hand() -> None:
    # F costs 1, B 2, and a message half a unit:  rank 0  F0 F1 B0 B1   rank 1  F0 B0 F1 B1
    found = simulate(orders_of(Stages("1f1b", 2), 2), 2, handover=0.5)
    assert found.starts == ((0.0, 1.0, 5.0, 8.0), (1.5, 2.5, 4.5, 5.5))
    assert found.time == 10.0


def test_a_costlier_stage_sets_the_pace() -> None:
    even, uneven = (predict(Stages("1f1b", 2), 8, costs) for costs in ((1.0, 1.0), (1.0, 2.0)))
    assert uneven.time == pytest.approx(2 * even.time - 3)
    assert uneven.bubble > even.bubble


def test_a_table_that_waits_in_a_ring_is_reported_with_what_each_rank_waits_for() -> None:
    wrong = orders_of(Stages("1f1b", 2), 2)
    wrong[0][:3] = [wrong[0][0], wrong[0][2], wrong[0][1]]  # F0 B0 F1 B1: as if rank 0 were the last
    wrong[1][:2] = [Action(1, "F", 1), Action(1, "F", 0)]
    with pytest.raises(DeadlockError, match="rank 0 stands at 0B0, which waits for 1B0 or 1I0; rank 1 stands at 1F1"):
        simulate(wrong, 2)


def test_a_table_that_lacks_an_action_is_reported() -> None:
    wrong = orders_of(Stages("zbv", 2, 2), 4)
    wrong[1].remove(Action(2, "I", 3))
    with pytest.raises(DeadlockError, match="waits for 2B3 or 2I3"):
        simulate(wrong, 4)
