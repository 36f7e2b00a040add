"""What a run shows while it goes on: a live line with a progress bar, or plain lines in a log.

    in a terminal    loss 2.913 | 41,200 tokens/s/gpu | 38.1% mfu | 61.2 GiB  ---------       120/400  0:04:12
    in a log file    step 120 | loss 2.913 | 41,200 tokens/s/gpu | 38.1% mfu | 61.2 GiB

Evaluations and events stay as lines of their own in both. Both are sinks (sinks.py) and write to stderr. They are
views: where nobody reads them any more (`2>&1 | head`, a terminal that was closed) they go silent, and the run goes on.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from meshwright.launcher.observe.metrics import Numbers


def step_line(numbers: Numbers, unit: str) -> str:
    """Return a step's numbers in one line, each with its unit; `unit` is what a rank is: gpu, rank."""
    parts = [
        f"step {numbers['step']}",
        f"loss {numbers['loss']:.3f}",
        f"{numbers['tokens_per_second_per_rank']:,.0f} tokens/s/{unit}",
        f"{numbers['mfu']:.1%} mfu",
        f"{numbers['memory_gib']:.1f} GiB",
    ]
    if numbers["skipped"]:
        parts.append(f"skipped, gradient norm {numbers['grad_norm']:.3g}")
    return " | ".join(parts)


def evaluation_line(numbers: Numbers) -> str:
    """Return an evaluation's numbers in one line."""
    shown = [f"step {numbers['step']}"]
    for name, value in numbers.items():
        if name not in ("kind", "time", "step"):
            text = f"{value:.3f}" if isinstance(value, float) else f"{value}"
            shown.append(f"{name.replace('_', ' ')} {text}")
    return " | ".join(shown)


class StderrConsole(Console):
    """A console on stderr that raises where its reader is gone; rich's own would end the program."""

    def __init__(self) -> None:
        """Write to stderr."""
        super().__init__(stderr=True)

    def on_broken_pipe(self) -> None:
        """Raise, as a plain write would.

        Raises:
            BrokenPipeError: always.
        """
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@contextmanager
def while_it_is_read() -> Iterator[None]:
    """Drop what cannot be shown; once the reader of stderr is gone, all that comes later goes nowhere.

    Else what is left in stderr's buffer would fail again when the program ends, and with it a run that went well.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)


class PlainLines:
    """A sink that prints a line for every n-th step, for the first and last, and for all else."""

    def __init__(self, say: Callable[[str], None], total_steps: int, every: int, unit: str) -> None:
        """Hand each line to `say`; `unit` is what a rank is called: gpu, rank."""
        self._say, self._total_steps, self._every, self._unit = say, total_steps, every, unit
        self._is_first = True

    def write(self, record: Numbers) -> None:
        """Print the record if it is due."""
        with while_it_is_read():
            self._print(record)

    def close(self) -> None:
        """Do nothing: nothing is held open."""

    def _print(self, record: Numbers) -> None:
        if record["kind"] == "step":
            step = int(record["step"] or 0)
            if self._is_first or step % self._every == 0 or step == self._total_steps or record["skipped"]:
                self._say(step_line(record, self._unit))
            self._is_first = False
        elif record["kind"] == "evaluation":
            self._say(evaluation_line(record))
        else:
            self._say(str(record["text"]))


class LiveLine:
    """A sink that keeps one line and a progress bar at the bottom of a terminal."""

    def __init__(self, console: Console, total_steps: int, unit: str) -> None:
        """Show nothing before the first step: what is printed until then needs no bar under it."""
        self._unit = unit
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=total_steps, start=False)
        self._is_shown = False

    def write(self, record: Numbers) -> None:
        """Move the bar, or print a line above it."""
        with while_it_is_read():
            self._show(record)

    def close(self) -> None:
        """Leave the last state on the screen and give the cursor back."""
        if self._is_shown:
            self._is_shown = False
            with while_it_is_read():
                self._progress.stop()

    def _show(self, record: Numbers) -> None:
        if record["kind"] == "step":
            self._move(record)
            return
        line = evaluation_line(record) if record["kind"] == "evaluation" else str(record["text"])
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _move(self, record: Numbers) -> None:
        step = int(record["step"] or 0)
        if not self._is_shown:
            # The remaining time is estimated from the steps of this start, not of those before a resume.
            self._progress.update(self._task, completed=step - 1)
            self._progress.start_task(self._task)
            self._progress.start()
            self._is_shown = True
        without_step = step_line(record, self._unit).partition(" | ")[2]
        self._progress.update(self._task, completed=step, description=without_step)
