"""The learning rate is what torch's schedulers give, at the steps that the module's docstring names."""

import warnings
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from meshwright.launcher.runfile.tables import LearningRateConfig
from meshwright.launcher.training.learning_rate import learning_rate_at, learning_rate_problems, warmup_length

PEAK = 3e-3
STEPS = 40
SCHEDULES = ["cosine", "linear", "wsd", "constant"]


def table(**keys: Any) -> LearningRateConfig:
    return LearningRateConfig.model_validate({"peak": PEAK, **keys})


def ours(total_steps: int, config: LearningRateConfig) -> list[float]:
    return [learning_rate_at(step, total_steps, config) for step in range(total_steps)]


def torchs(make: Any, updates: int) -> list[float]:
    """Return the rates that an optimizer at `PEAK` sees at each of its updates, the first one first."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler: LRScheduler = make(optimizer)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls step(epoch), which torch itself deprecates
        for _ in range(updates):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return rates


def warmup_by_torch(optimizer: torch.optim.Optimizer, warmup: int) -> LinearLR:
    """Rise from peak / w at the first update to the peak at update w."""
    return LinearLR(optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=warmup - 1)


def close(actual: list[float], expected: list[float]) -> None:
    assert actual == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("warmup", [2, 10])
@pytest.mark.parametrize("final_fraction", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_warmup_and_decay_are_torchs_sequence(schedule: str, final_fraction: float, warmup: int) -> None:
    decay = 8 if schedule == "wsd" else STEPS - warmup

    def make(optimizer: torch.optim.Optimizer) -> SequentialLR:
        down: LRScheduler
        if schedule == "cosine":
            down = CosineAnnealingLR(optimizer, T_max=decay, eta_min=PEAK * final_fraction)
        else:
            down = LinearLR(optimizer, start_factor=1.0, end_factor=final_fraction, total_iters=decay)
        stable = ConstantLR(optimizer, factor=1.0, total_iters=STEPS)
        # torch's decay begins with the peak itself: at our update w, or N - decay.
        milestones = [warmup - 1, STEPS - decay - 1]
        return SequentialLR(optimizer, [warmup_by_torch(optimizer, warmup), stable, down], milestones)

    config = table(schedule=schedule, final_fraction=final_fraction, warmup_steps=warmup, decay_fraction=0.2)
    close(ours(STEPS, config), torchs(make, STEPS))


@pytest.mark.parametrize("final_fraction", [0.0, 0.25])
def test_cosine_without_warmup_is_torchs_one_update_later(final_fraction: float) -> None:
    config = table(schedule="cosine", final_fraction=final_fraction)
    eta_min = PEAK * final_fraction
    rates = torchs(lambda optimizer: CosineAnnealingLR(optimizer, T_max=STEPS, eta_min=eta_min), STEPS + 1)
    close(ours(STEPS, config), rates[1:])


def test_constant_after_warmup_is_torchs_warmup() -> None:
    config = table(schedule="constant", warmup_steps=5, final_fraction=0.1)
    close(ours(STEPS, config), torchs(lambda optimizer: warmup_by_torch(optimizer, 5), STEPS))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_first_peak_and_last_update_are_exact(schedule: str) -> None:
    rates = ours(STEPS, table(schedule=schedule, warmup_steps=7, final_fraction=0.1))
    assert rates[0] == PEAK / 7
    assert rates[6] == PEAK
    assert max(rates) == PEAK
    assert rates[-1] == (PEAK if schedule == "constant" else PEAK * 0.1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_rises_and_then_never_rises_again(schedule: str) -> None:
    rates = ours(STEPS, table(schedule=schedule, warmup_steps=7))
    assert rates[:7] == sorted(set(rates[:7]))
    assert rates[6:] == sorted(rates[6:], reverse=True)


def test_wsd_leaves_the_peak_at_the_last_fraction_of_all_steps() -> None:
    rates = ours(STEPS, table(schedule="wsd", warmup_steps=10, decay_fraction=0.25, final_fraction=0.0))
    assert rates[9:30] == [PEAK] * 21
    assert 0 < rates[30] < PEAK
    assert rates[-1] == 0.0


def test_a_fraction_of_warmup_is_the_nearest_number_of_steps() -> None:
    for total, expected in [(30, 3), (34, 3), (36, 4), (4, 0)]:  # 0.1 * 30 is a hair above 3
        assert warmup_length(total, table(warmup_fraction=0.1)) == expected
    assert ours(30, table(warmup_fraction=0.1)) == ours(30, table(warmup_steps=3))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_may_be_all_warmup_or_a_single_step(schedule: str) -> None:
    all_warmup = table(schedule=schedule, warmup_steps=4, decay_fraction=0.0)
    assert ours(4, all_warmup) == [PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK]
    expected = PEAK if schedule == "constant" else PEAK * 0.1
    assert ours(1, table(schedule=schedule, decay_fraction=1.0)) == [expected]


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_beyond_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} is none of the run's 10"):
        learning_rate_at(step, 10, table())


def test_a_table_that_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps = 11: must not exceed train.steps = 10"):
        learning_rate_at(0, 10, table(warmup_steps=11))
    config = table(schedule="wsd", warmup_steps=9, decay_fraction=0.2)
    (problem,) = learning_rate_problems(10, config)
    assert "warm-up (9 steps) and decay (2 steps)" in problem
    assert "at most 0.1 would fit" in problem
    assert learning_rate_problems(10, config.model_copy(update={"decay_fraction": 0.1})) == []
