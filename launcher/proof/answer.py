"""Where the answer of `prove` and `verify-resume` goes, and what is said when there will be none.

    before    answer_place    the file can be written: found out in a moment, and not after minutes of work
    while     stoppable       SIGTERM, Ctrl-C -> the ranks are ended, one line, status 143 or 130, no file
    after     undisturbed     the answer is known: a signal that comes now no longer takes it away

No torch is loaded here.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from meshwright.launcher.runfile.messages import ConfigError, problem

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _StopError(BaseException):
    """A signal came; no Exception, so that nothing on the way takes it for a failed rank."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def answer_place(out: Path | None, output_folder: str, name: str, *, source: str) -> Path:
    """Return the file that is to be written: `out`, or else `name` in the run's folder; nothing is left on the disk.

    Raises:
        ConfigError: if it could not be written; `source` is the run file, as the user gave it.
    """
    if out is not None:
        if problems := _out_problems(out, name):
            raise ConfigError("--out", problems)
        return out
    path = Path(output_folder, name)
    if rule := _why_not(path):
        line = problem("run.folder", output_folder, f"{path}: {rule}", f"--out {name}, or another folder, would fit")
        raise ConfigError(source, [line])
    return path


@contextmanager
def with_mistakes_of(out: Path | None, name: str) -> Iterator[None]:
    """Where the run file is read: what is wrong with it is told together with what is wrong with --out."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(error.source, [*error.problems, *(_out_problems(out, name) if out else [])]) from None


def _out_problems(out: Path, name: str) -> list[str]:
    rule = _why_not(out)
    way_out = f"--out {out / name} would fit" if out.is_dir() else "name a file in a folder that can be written"
    return [problem("--out", str(out), rule, way_out)] if rule else []


def _why_not(path: Path) -> str:
    """Return why an answer cannot be written there, or nothing."""
    try:
        _try_to_write(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, FileExistsError):  # mkdir's word for it
            reason = "something on its way is no folder"
        return "is a folder, and must be a file" if path.is_dir() else f"the answer cannot be written there ({reason})"
    return ""


def _try_to_write(path: Path) -> None:
    """Make the file and the folders on its way, and remove again what was made; a file that is there stays as it is.

    Raises:
        OSError: the system's answer. Permissions alone do not tell: root has all of them in a folder such as /proc.
    """
    if path.exists():
        if path.is_file() or path.is_dir():
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
        return  # else a pipe or a device: to open it may wait, or be noticed
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        path.unlink()
    finally:
        for folder in missing:  # the innermost first
            if folder.is_dir():
                folder.rmdir()


@contextmanager
def stoppable(command: str, nothing: str, path: Path) -> Iterator[None]:
    """End by SIGTERM or Ctrl-C with one line: what was stopped, that `nothing` is known, and that no file says it."""
    parent = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == parent:
            raise _StopError(number)
        if number != signal.SIGINT:  # a rank: Ctrl-C reaches the parent too, which ends all of them
            os._exit(128 + number)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    except _StopError as error:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _end(error.number, f"{command} was stopped by {signal.Signals(error.number).name}: {nothing}", path)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, line: str, path: Path) -> NoReturn:
    print(f"meshwright: {line}, and {path} was not written", file=sys.stderr, flush=True)
    raise SystemExit(128 + number) from None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let no signal end this: for the moment in which an answer that is known is told and written."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(path: Path, write: Callable[[], None], *, is_same: bool) -> None:
    """Write the answer and say where; a disk that is full by now takes nothing from a verdict that was told.

    Raises:
        ConfigError: if it cannot be written, and there is no difference, whose exit status counts more.
    """
    try:
        write()
    except OSError as error:
        rule = f"the answer cannot be written there ({error.strerror}); the verdict above stands"
        unwritten = ConfigError(str(path), [f"{rule}; --out FILE on another disk would fit"])
        if is_same:
            raise unwritten from None
        print(unwritten, file=sys.stderr)
        return
    tell(f"  written  {path}")


def tell(*lines: str) -> None:
    """Print lines at once, so that a long proof shows how far it is."""
    for line in lines:
        print(line, flush=True)
