"""Start the ranks of one machine, and look after them: `meshwright train run.toml --ranks 2`.

    parent            listens on a free port, starts the ranks, forwards signals, loads no torch
      |- rank 0       inherits the listening socket: the ranks' store runs on it, so no other program can take the port
      |- rank 1       the same command line, with the variables that torchrun would set
      ...

    a rank dies       the others have a second to end by themselves, then SIGTERM, four seconds later SIGKILL;
                      one line names the first that died and how, unless it said so itself
    an error          is left in a file by each rank, and said once when all have ended (launcher/last_words.py)
    SIGTERM, Ctrl-C   SIGTERM to every rank, once; then as long as it takes until they have saved
                      a rank that still starts does not hear them yet and is ended by them: nothing is lost, but no
                      checkpoint is written either, so that the status is 1 and a job script does not go on to export
    Ctrl-C again      SIGKILL to every rank; said so, with status 1
    SIGUSR1, SIGUSR2  passed on
    parent killed     the kernel sends SIGTERM to every rank (Linux)
    exit status       0; 2 if the rank that failed first ended with 2 (the user's input); otherwise 1

Why not torch's elastic launcher as a library: with torch 2.13 its `shutdown_timeout` holds for signals only, and after
a rank's death one that was stuck in a collective stayed for 30 s; after a signal it drops the ranks' exit statuses, so
a save that failed would look like one that went well; and it loads torch before any rank is started.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import IO, NamedTuple

from meshwright.launcher.kept_memory import command_again, restart_with_kept_memory, with_kept_memory
from meshwright.launcher.last_words import WORDS, is_consequence, lines_of, read_words
from meshwright.launcher.ranks.environment import (
    LISTENING,
    STARTED_HERE,
    RankInfo,
    check_ranks_option,
    threads_of,
    who_am_i,
)
from meshwright.launcher.ranks.with_parent import end_with_parent

_POLL_SECONDS = 0.05
# After a rank died: how long the others may take to end by themselves, then how long to answer SIGTERM.
_SETTLE_SECONDS, _TERM_SECONDS = 1.0, 4.0
# After a rank refused what the user gave: every rank will, on a busy machine not at the same moment.
_REFUSED, _REFUSAL_SECONDS = 2, 4.0
_PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR2,
}


class _Rank(NamedTuple):
    """A rank as its parent knows it."""

    process: subprocess.Popen[bytes]
    words: IO[bytes]
    """The file that it leaves its last words in."""


def become_a_rank(ranks: int, threads: int = 0) -> RankInfo:
    """Return in every process that is a rank; one that is asked to start several does so, waits, and exits.

    `ranks` is the command's `--ranks` (0: not given), `threads` the run file's CPU threads of each rank (0: the cores
    are shared). A command calls this before it loads anything heavy.

    Raises:
        ValueError: if `ranks` contradicts the ranks found, or no port can be had.
    """
    info = who_am_i()
    check_ranks_option(ranks, info)
    if ranks > 1 and info.is_alone:
        sys.exit(run_local_ranks(command_again(), ranks, threads))
    restart_with_kept_memory()
    return info


def run_local_ranks(command: Sequence[str], ranks: int, threads: int = 0) -> int:
    """Run `command` as so many ranks on this machine and return the exit status of them all.

    Must be called in the main thread, since it takes the process's signals while the ranks run.

    Raises:
        ValueError: if MASTER_PORT is set and in use.
    """
    with _listening_socket() as listening:
        started = _start(command, ranks, threads, listening)
    return _Watch(started).until_all_ended()


def _listening_socket() -> socket.socket:
    asked = os.environ.get("MASTER_PORT", "0")
    if not asked.isdecimal() or int(asked) > 65535:
        raise ValueError(f"MASTER_PORT = {asked!r}: must be a port, 1 to 65535; unset, a free one is taken")
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", int(asked)))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise ValueError(
            f"MASTER_PORT = {asked}: port {asked} cannot be had ({error.strerror}); unset MASTER_PORT, and a free "
            "port is taken"
        ) from None
    return listening


def _start(command: Sequence[str], ranks: int, threads: int, listening: socket.socket) -> list[_Rank]:
    alike = RankInfo(0, ranks, 0, ranks, 0, "started here")
    # What an outer torchrun left for its one process would send the ranks to its store.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    common = with_kept_memory(ours) | {
        STARTED_HERE: "1",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listening.getsockname()[1]),
        "OMP_NUM_THREADS": str(threads_of(alike, threads)),
    }
    common.pop(LISTENING, None)
    started: list[_Rank] = []
    try:
        for rank in range(ranks):
            words = tempfile.TemporaryFile()  # noqa: SIM115  (no name: gone with the last process that holds it)
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), WORDS: str(words.fileno())}
            inherited: tuple[int, ...] = (words.fileno(),)
            if rank == 0:
                inherited += (listening.fileno(),)
                own[LISTENING] = str(listening.fileno())
            # A group of their own: Ctrl-C reaches the parent alone, so that a rank gets each signal once.
            process = subprocess.Popen(
                command,
                env=common | own,
                pass_fds=inherited,
                process_group=0,
                preexec_fn=end_with_parent(signal.SIGTERM),
            )
            started.append(_Rank(process, words))
    except BaseException:
        for each in started:
            each.process.kill()
        raise
    return started


class _Watch:
    """The parent's view of its ranks: who ended, in which order, and which signals came in the meantime."""

    def __init__(self, started: list[_Rank]) -> None:
        self.started = started
        self.failed: list[tuple[int, int]] = []  # (rank, exit code), in the order of their end
        self.running = {rank: each.process for rank, each in enumerate(started)}
        self.interrupts = 0
        self.ended_by_us = False
        self.passed_on: dict[int, int] = {}
        """Each signal that the ranks were sent for one that came from outside, with the one that came."""

    def until_all_ended(self) -> int:
        """Wait for every rank, forward signals, end the others when one dies; return the exit status."""
        before = {number: signal.signal(number, self._pass_on) for number in _PASSED_ON if _is_heard(number)}
        try:
            while self.running:
                self._collect()
                if self.failed and self.running:
                    self._end_the_others()
                elif self.running:
                    time.sleep(_POLL_SECONDS)
        except BaseException:
            self._send(signal.SIGKILL)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._status()

    def _collect(self) -> None:
        for rank, process in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[rank]
            if code != 0 and not self.ended_by_us:
                self.failed.append((rank, code))

    def _end_the_others(self) -> None:
        was_refused = all(code == _REFUSED for _, code in self.failed)
        self._wait(_REFUSAL_SECONDS if was_refused else _SETTLE_SECONDS)
        self.ended_by_us = bool(self.running)
        self._send(signal.SIGTERM)
        self._wait(_TERM_SECONDS)
        self._send(signal.SIGKILL)
        self._wait(float("inf"))

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.running and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            self._collect()

    def _send(self, number: int) -> None:
        for process in self.running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:  # the user will not wait any longer
            self._send(signal.SIGKILL)
        else:
            sent = _PASSED_ON[signal.Signals(number)]
            self.passed_on[sent] = number
            self._send(sent)

    def _status(self) -> int:
        if not self.failed:
            return 0
        words = {rank: read_words(self.started[rank].words) for rank, _ in self.failed}
        for line in lines_of(words, len(self.started)):
            print(line, file=sys.stderr)
        causes = [one for one in self.failed if not is_consequence(words[one[0]])] or self.failed
        if line := self._ended_from_outside({-code for _, code in causes}):
            print(f"meshwright: {line}", file=sys.stderr)
            return 1
        silent = [one for one in causes if words[one[0]] is None]
        # Ranks that all ended with 2 and left no words have said it on stderr themselves.
        if self.ended_by_us or (silent and any(code != 2 for _, code in self.failed)):
            rank, code = (silent or causes)[0]
            others = " The others were ended." if self.ended_by_us else ""
            print(f"meshwright: rank {rank} of {len(self.started)} {_how_it_ended(code)}.{others}", file=sys.stderr)
        return 2 if causes[0][1] == 2 else 1

    def _ended_from_outside(self, ended_by: set[int]) -> str:
        """Say what the user did, if that alone ended the ranks; `ended_by` are the signals that did."""
        if self.interrupts > 1 and ended_by <= {signal.SIGKILL, *self.passed_on}:
            return "ended at once, at the second Ctrl-C; the checkpoints that are finished stay"
        if not ended_by <= self.passed_on.keys():  # after its start a rank that is told to stop ends by itself
            return ""
        sent = max(ended_by)
        told = "asked for a checkpoint" if sent == signal.SIGUSR2 else "told to stop"
        came = signal.Signals(self.passed_on[sent]).name
        return (
            f"the run was {told} ({came}) before its first step, while its ranks were starting, and ended. Nothing was"
            " lost: the same command starts it again, from the newest checkpoint if there is one"
        )


def _is_heard(number: int) -> bool:
    """Say whether a signal is not ignored: `nohup` ignores SIGHUP, and the ranks are to go on then."""
    return signal.getsignal(number) is not signal.SIG_IGN


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (the system does this when memory runs out)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
