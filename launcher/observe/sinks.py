"""Where the numbers of a run go: always metrics.jsonl, on rank 0 also the terminal; others are more sinks.

    loop -> Sinks.step(numbers)         -> {"kind": "step", ...}        -> JsonLines     metrics.jsonl, every record
            Sinks.evaluation(numbers)      {"kind": "evaluation", ...}     LiveLine or PlainLines
            Sinks.event(text)              {"kind": "event", ...}          any other `Sink`

A `Sink` takes flat records and shows or stores them. The file is the truth: a view that loses its last records in a
kill can be made again from it, and a view that can no longer be written goes silent (terminal.py), which the file may
not. A run that resumes at step k makes the steps after k again, so their old lines are moved to metrics.dropped.jsonl
first, by an atomic rewrite, and no step stands in the file twice.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

from meshwright.launcher.observe.metrics import Numbers, Value
from meshwright.launcher.observe.records import Kind, decode, encode
from meshwright.launcher.observe.terminal import LiveLine, PlainLines, StderrConsole

METRICS_FILE, DROPPED_FILE = "metrics.jsonl", "metrics.dropped.jsonl"


@runtime_checkable
class Sink(Protocol):
    """Takes every record of a run, on rank 0 only."""

    def write(self, record: Numbers) -> None:
        """Show or store one record; `kind` is step, evaluation or event, `time` is in seconds since 1970."""

    def close(self) -> None:
        """Finish; called once, also after an error."""


class Sinks:
    """All sinks of a run as one; without any, on ranks other than 0, it does nothing."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        """Take the sinks; they are closed in this order."""
        self._sinks = tuple(sinks)

    def step(self, numbers: Mapping[str, Value]) -> None:
        """Tell the numbers of one update."""
        self._write("step", numbers)

    def evaluation(self, numbers: Mapping[str, Value]) -> None:
        """Tell the numbers of one evaluation: step, validation_loss and what belongs to them."""
        self._write("evaluation", numbers)

    def event(self, text: str) -> None:
        """Tell in words what happened: a resume, a checkpoint, a choice that was made."""
        self._write("event", {"text": text})

    def close(self) -> None:
        """Close every sink, also when closing one of them fails."""
        with ExitStack() as stack:
            for sink in reversed(self._sinks):
                stack.callback(sink.close)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write(self, kind: Kind, numbers: Mapping[str, Value]) -> None:
        record: Numbers = {"kind": kind, "time": round(time.time(), 3), **numbers}
        for sink in self._sinks:
            sink.write(record)


class JsonLines:
    """A sink that appends each record to a file as one line, handed to the system at once."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        """Open the file to continue after step `resumed_at`; 0 starts a run."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.dropped = drop_lines_after(path, resumed_at)
        self._path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Numbers) -> None:
        """Append one line.

        Raises:
            OSError: naming the file, for instance when the disk is full.
        """
        with self._named_errors():
            self._file.write(encode(record) + "\n")

    def close(self) -> None:
        """Close the file; a line that could not be written is tried once more.

        Raises:
            OSError: naming the file.
        """
        with self._named_errors():
            self._file.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            told = f"cannot append to the run's metrics: {error.strerror}"
            raise OSError(error.errno, told, str(self._path)) from error


def drop_lines_after(path: Path, step: int) -> int:
    """Move the steps and evaluations after `step` to a file beside this one; return how many lines went.

    Events, which have no step, stay. Lines that are no whole record, such as the last one of a killed run, go too.
    """
    if not path.exists():
        return 0
    kept: list[str] = []
    dropped: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        record = decode(line)
        (kept if record is not None and int(record.get("step") or 0) <= step else dropped).append(line)
    if dropped:
        _write_lines(path.with_name(DROPPED_FILE), "a", dropped)
        aside = path.with_name(path.name + ".new")
        _write_lines(aside, "w", kept)
        aside.replace(path)
    return len(dropped)


def _write_lines(path: Path, mode: str, lines: list[str]) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def open_sinks(
    folder: Path, *, rank: int, total_steps: int, resumed_at: int = 0, every: int = 1, unit: str = "rank"
) -> Sinks:
    """Open a run's sinks on this rank: the file, and a live line where stderr is a terminal, else plain lines.

    Every step is written to the file; `every` thins the plain lines only. `unit` is what a rank is: gpu, rank.
    """
    if rank != 0:
        return Sinks([])
    shown = _terminal_sink(total_steps, every, unit)
    lines = JsonLines(folder / METRICS_FILE, resumed_at)
    sinks = Sinks([shown, lines])
    if lines.dropped > 0:
        where = f"{METRICS_FILE}: {lines.dropped} lines after step {resumed_at}"
        sinks.event(f"{where} moved to {DROPPED_FILE}; they are made again")
    return sinks


def _terminal_sink(total_steps: int, every: int, unit: str) -> Sink:
    if not sys.stderr.isatty():
        return PlainLines(partial(print, file=sys.stderr, flush=True), total_steps, every, unit)
    return LiveLine(StderrConsole(), total_steps, unit)
