"""Ranks on this machine's CPU, forked from a process that has loaded everything: they begin in milliseconds.

    with Fork(8, work) as ranks:        rank r calls work(r) within a gloo group of 8, and answers
        answers = ranks.answers(120)    in rank order; a rank that fails, dies or hangs raises RankLostError

What `work` needs is inherited by the fork; what it returns is pickled. The ranks meet in a file in a folder of their
own, so that no port can be taken. Whatever happens, they are ended: by `with`, or by the kernel if this process dies.
"""

import multiprocessing
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from meshwright.launcher.ranks.with_parent import end_with_parent

_SETTLE_SECONDS = 2.0  # after a rank was lost: how long the others may take to say that they miss it
_LONGEST = 300
_POLL_SECONDS = 0.02
# With these nobody ends himself.
_FROM_OUTSIDE = tuple(f"was killed by {number.name}" for number in (signal.SIGKILL, signal.SIGTERM))


class RankLostError(RuntimeError):
    """A rank raised an error, died or did not answer."""

    is_same_on_all_ranks = True
    """For the command line: its message is for a person."""

    def __init__(self, line: str, details: str = "") -> None:
        """Take the one line that is told, and the traceback where there is one."""
        super().__init__(line)
        self.details = details


class NoAnswerError(RankLostError):
    """Nothing is known of what the ranks compute: they were slow, or somebody ended one of them.

    The time was up before all had answered, on a machine that has other work perhaps; or the kernel, short of memory,
    or a person killed a rank.
    """


class Fork:
    """So many ranks that each do one piece of work."""

    def __init__(self, size: int, work: Callable[[int], Any], *, timeout_seconds: int = 60) -> None:
        """Start the ranks."""
        context = multiprocessing.get_context("fork")
        self._end_with_parent = end_with_parent(signal.SIGKILL)
        self.size, self.timeout = size, timedelta(seconds=timeout_seconds)
        self._folder = tempfile.TemporaryDirectory(prefix="meshwright-ranks-")
        self._pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        sys.stdout.flush()  # or each fork would print again what waits in the buffer
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=self._serve, args=(rank, work, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> "Fork":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def answers(self, seconds: float) -> list[Any]:
        """Return what every rank's work returned.

        Raises:
            RankLostError: naming the first rank that failed.
            NoAnswerError: naming those that are silent when the time is up, or the one that was killed.
        """
        found, lost = self._collect(seconds)
        silent = [rank for rank in range(self.size) if rank not in found and rank not in lost]
        if lost and silent and all(_is_timeout(line) for line, _ in lost.values()):
            raise NoAnswerError(f"of {self.size} ranks {silent} kept the others waiting until their time was up")
        if lost:
            raise self._lost(lost)
        if silent:
            raise NoAnswerError(f"of {self.size} ranks {silent} did not answer within {seconds:.0f} s, and were ended")
        return [found[rank] for rank in range(self.size)]

    def kill_when(self, is_due: Callable[[], bool], seconds: float) -> None:
        """Kill every rank (SIGKILL) as soon as it is due: at that moment they all must still be at work.

        Raises:
            RankLostError: if one of them ended before.
            NoAnswerError: if the time is up.
        """
        until = time.monotonic() + seconds
        while not is_due():
            if wait(self._pipes, timeout=_POLL_SECONDS):  # an answer, or the end of a rank: neither should be yet
                self.answers(_SETTLE_SECONDS)
                raise RankLostError(f"a rank of {self.size} came to its end before it could be killed")
            if time.monotonic() > until:
                raise NoAnswerError(f"the {self.size} ranks did not come to where they are killed in {seconds:.0f} s")
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def _collect(self, seconds: float) -> tuple[dict[int, Any], dict[int, tuple[str, str]]]:
        """Return what the ranks answered, and how those were lost that did not."""
        found: dict[int, Any] = {}
        lost: dict[int, tuple[str, str]] = {}
        until = time.monotonic() + seconds
        while len(found) + len(lost) < self.size:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in found and rank not in lost}
            ready = wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
            for pipe in ready:
                assert isinstance(pipe, Connection)
                ok, answer = self._received(waiting[pipe])
                (found if ok else lost)[waiting[pipe]] = answer
            if lost:
                until = min(until, time.monotonic() + _SETTLE_SECONDS)
            if not ready:
                break
        return found, lost

    def _received(self, rank: int) -> tuple[bool, Any]:
        try:
            ok, answer = pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            self.processes[rank].join()
            code = self.processes[rank].exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return False, (how, "")
        return bool(ok), answer

    def _lost(self, lost: dict[int, tuple[str, str]]) -> RankLostError:
        """Return the error of the rank that failed by itself: the others only miss it."""
        causes = [rank for rank, (line, _) in lost.items() if not _is_consequence(line)] or list(lost)
        line, details = lost[causes[0]]
        line = line if len(line) <= _LONGEST else line[:_LONGEST] + " ..."
        kind = NoAnswerError if line in _FROM_OUTSIDE else RankLostError
        return kind(f"rank {causes[0]} of {self.size} {line}", details)

    def _serve(self, rank: int, work: Callable[[int], Any], pipe: Connection) -> None:
        if self._end_with_parent is not None:
            self._end_with_parent()
        torch.set_num_threads(1)
        try:
            if self.size > 1:
                store = FileStore(str(Path(self._folder.name) / "store"), self.size)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=self.size, timeout=self.timeout)
            answer: tuple[bool, Any] = (True, work(rank))
        except BaseException as error:  # whatever it is, the parent must hear of it
            line = " ".join(str(error).split())
            answer = (False, (f"failed: {type(error).__name__}: {line}", traceback.format_exc()))
        pipe.send_bytes(pickle.dumps(answer, protocol=5))
        # Stay until the parent ends this process: others may still be reading from its sockets, and what the parent
        # would do at its end, such as removing its folders, is not ours to do.
        while True:
            signal.pause()


def _is_timeout(line: str) -> bool:
    return "timed out" in line.lower()


def _is_consequence(line: str) -> bool:
    return any(sign in line.lower() for sign in ("connection closed", "connection reset", "broken pipe", "timed out"))
