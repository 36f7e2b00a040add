"""Where the seconds of a step go: waiting for data, forward and backward, optimizer.

    with clock.lap("data"): ...                 may be entered many times in a step; a lap's times add up
    with clock.lap("forward_backward"): ...
    with clock.lap("optimizer"): ...
    laps = clock.finish()                       ends the step; the next one begins here

A GPU runs behind the program that feeds it. There a lap is timed by events in the device's own queue, which costs it
no waiting, and `finish` waits once for the last of them. `data` is the program's own time on every device.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from meshwright.launcher.observe.peak import synchronize


@dataclass(frozen=True)
class Laps:
    """Seconds of one step: the whole of it by the wall, and three parts of it."""

    total: float
    data: float
    forward_backward: float
    optimizer: float

    @property
    def other(self) -> float:
        """Return what is in no part: reductions after the backward pass, checkpoints, evaluation, logging."""
        return max(0.0, self.total - self.data - self.forward_backward - self.optimizer)


class StepClock:
    """Time the laps of one step after another."""

    def __init__(self, device: torch.device) -> None:
        """Begin the first step."""
        self._device = device
        self._seconds = {"data": 0.0, "forward_backward": 0.0, "optimizer": 0.0}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._began = time.perf_counter()

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Add the time of the block to a lap: data, forward_backward or optimizer."""
        assert name in self._seconds, f"no lap is called {name}"
        if self._device.type == "cuda" and name != "data":
            first, last = _event(), _event()
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
            return
        began = time.perf_counter()
        yield
        if name != "data":
            synchronize(self._device)
        self._seconds[name] += time.perf_counter() - began

    def finish(self) -> Laps:
        """Return the seconds of the step that ends here, and begin the next."""
        for name, first, last in self._events:
            last.synchronize()
            self._seconds[name] += first.elapsed_time(last) / 1e3
        self._events.clear()
        now = time.perf_counter()
        laps = Laps(total=now - self._began, **self._seconds)
        self._began = now
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return laps


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
