"""The learning rate as a pure function of the step.

Steps count from 0, so step i is update number u = i + 1 of N. With w updates of warm-up:

    peak          w _______________              warm-up    u <= w:  peak * u / w
                  /|               \\             after it   peak down to final_fraction * peak,
                 / |                \\                       by (u - w) / (N - w), from 0 to 1
    peak / w    /  |                 \\_ N
               1   |                                        peak * final_fraction at u = N

    first update  peak / w: never zero, so that it is not wasted. Without warm-up it has made 1/N of the way down.
    update w      exactly the peak
    last update   exactly peak * final_fraction (0 there means that the last update changes nothing)

The ways down:  cosine    half a cosine over all updates after the warm-up
                linear    a straight line over the same
                wsd       stays at the peak, then a straight line over the last decay_fraction of *all* N updates
                constant  stays at the peak; final_fraction is not used

Nothing is remembered between steps: a resumed run, or one whose number of steps was changed, asks for its step
and needs no state. This file loads no torch: `check` uses it too.
"""

import math

from meshwright.launcher.runfile.tables import LearningRateConfig


def learning_rate_at(step: int, total_steps: int, table: LearningRateConfig) -> float:
    """Return the learning rate of one update; `step` counts from 0 and is below `total_steps`.

    Raises:
        ValueError: if the step is not one of the run's, or the table does not fit into so many steps.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is none of the run's {total_steps} (they count from 0)")
    if problems := learning_rate_problems(total_steps, table):
        raise ValueError("; ".join(problems))
    update = step + 1
    warmup = warmup_length(total_steps, table)
    if update <= warmup:
        return table.peak * update / warmup
    return table.peak * _way_down(update, total_steps, table)


def warmup_length(total_steps: int, table: LearningRateConfig) -> int:
    """Return the number of warm-up updates, as given or as the nearest whole number to the fraction of all."""
    return table.warmup_steps or round(table.warmup_fraction * total_steps)


def decay_length(total_steps: int, table: LearningRateConfig) -> int:
    """Return the number of updates, the last ones, over which the rate falls from its peak."""
    if table.schedule == "constant":
        return 0
    if table.schedule == "wsd":
        return round(table.decay_fraction * total_steps)
    return total_steps - warmup_length(total_steps, table)


def learning_rate_problems(total_steps: int, table: LearningRateConfig) -> list[str]:
    """Return every reason why the table cannot be followed over so many steps; empty means that it can."""
    warmup = warmup_length(total_steps, table)
    if warmup > total_steps:
        return [
            f"learning_rate.warmup_steps = {warmup}: must not exceed train.steps = {total_steps}; "
            "shorten it, or give learning_rate.warmup_fraction instead"
        ]
    decay = decay_length(total_steps, table)
    if warmup + decay > total_steps:
        fits = (total_steps - warmup) / total_steps
        return [
            f"learning_rate.decay_fraction = {table.decay_fraction}: warm-up ({warmup} steps) and decay "
            f"({decay} steps) must fit into train.steps = {total_steps}; at most {fits:.4g} would fit"
        ]
    return []


def _way_down(update: int, total_steps: int, table: LearningRateConfig) -> float:
    """Return the part of the peak that remains at an update after the warm-up."""
    length = decay_length(total_steps, table)
    made = update - (total_steps - length)
    if made <= 0:
        return 1.0
    progress = made / length
    # Ends that are exact in floating point: 0 -> 1.0, 1 -> final_fraction.
    remaining = (1.0 + math.cos(math.pi * progress)) / 2 if table.schedule == "cosine" else 1.0 - progress
    return table.final_fraction + (1.0 - table.final_fraction) * remaining
