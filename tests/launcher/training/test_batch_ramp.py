"""The batch size of a step is a function of the samples before it; closed forms agree with walking through."""

import random

import pytest

from meshwright.launcher.runfile.tables import TrainConfig
from meshwright.launcher.training.batch_ramp import BatchRamp


def walk(ramp: BatchRamp, steps: int) -> list[int]:
    """Return the samples consumed before each step and after the last, one step at a time."""
    consumed = [0]
    for _ in range(steps):
        consumed.append(consumed[-1] + ramp.size_at(consumed[-1]))
    return consumed


def test_a_size_holds_until_its_samples_are_consumed() -> None:
    ramp = BatchRamp(((100, 8), (200, 16)), 32)
    assert [ramp.size_at(n) for n in (0, 99, 100, 199, 200, 10**12)] == [8, 8, 16, 16, 32, 32]
    assert ramp.sizes == (8, 16, 32)
    # The 13th step begins at 96 and ends at 104; the six of 16 begin at 104 and end at 200.
    assert walk(ramp, 20)[12:21] == [96, 104, 120, 136, 152, 168, 184, 200, 232]


def test_without_a_ramp_the_size_is_constant() -> None:
    ramp = BatchRamp.of(TrainConfig(steps=5, global_batch_size=12))
    assert (ramp.size_at(0), ramp.samples_after(7)) == (12, 84)


def test_the_train_table_becomes_its_ramp() -> None:
    entries = [{"samples": 30, "global_batch_size": 4}, {"samples": 60, "global_batch_size": 8}]
    keys = {"steps": 5, "global_batch_size": 16, "batch_ramp": entries}
    assert BatchRamp.of(TrainConfig.model_validate(keys)) == BatchRamp(((30, 4), (60, 8)), 16)


def test_closed_forms_agree_with_walking_through_the_steps() -> None:
    draw = random.Random(0)
    for _ in range(20):
        ends = sorted(draw.sample(range(1, 120), draw.randint(0, 4)))
        ramp = BatchRamp(tuple((end, draw.randint(1, 50)) for end in ends), draw.randint(1, 50))
        consumed = walk(ramp, 40)
        assert [ramp.samples_after(k) for k in range(41)] == consumed


def test_an_entry_that_a_large_step_jumps_over_is_never_used() -> None:
    ramp = BatchRamp(((10, 100), (50, 7)), 20)
    assert walk(ramp, 3) == [0, 100, 120, 140]
    assert ramp.samples_after(3) == 140


def test_what_is_no_ramp_is_refused() -> None:
    with pytest.raises(ValueError, match="samples = 50 must be above the 100 before it"):
        BatchRamp(((100, 8), (50, 16)), 32)
    with pytest.raises(ValueError, match="global_batch_size = 0 must be at least 1"):
        BatchRamp(((100, 0),), 32)
