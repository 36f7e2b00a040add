"""One run at a time in a folder: rank 0 holds a lock on it for as long as it trains.

Two runs in one folder would remove each other's checkpoints as leftovers and mix their metrics. The lock is the
system's (flock on <folder>/lock), so it is gone with the process that held it, however that ended. The file says who
holds it. Where a shared file system knows no locks, the run goes on without and says so.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EAGAIN
from pathlib import Path

from meshwright.data.meta import TOKENIZER_NAME
from meshwright.launcher.observe.provenance import PROVENANCE_FILE
from meshwright.launcher.observe.sinks import METRICS_FILE
from meshwright.launcher.observe.summary import PICTURE_FILE, SUMMARY_FILE
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.parallel.checkpoint.agree import ranks_of
from meshwright.parallel.mesh import Mesh

LOCK_NAME = "lock"
RUN_FILES = (LOCK_NAME, METRICS_FILE, SUMMARY_FILE, PICTURE_FILE, PROVENANCE_FILE, TOKENIZER_NAME, "run.toml")
# A node that crashed holds its locks on a network file system until the server gives up on it.
_OTHER_HOST_SECONDS = 120.0


@contextmanager
def run_lock(folder: Path, mesh: Mesh) -> Iterator[list[str]]:
    """Make the run's folder and hold its lock; yield what is to be told of it. Every rank calls this.

    Raises:
        ConfigError: on every rank, if the folder cannot be written to, or another process trains in it.
    """
    held: list[int] = []  # rank 0's descriptor
    events, problem = ranks_of(mesh).first(lambda: _take(folder, held))
    if problem:
        raise ConfigError(f"run.folder = {folder}", [problem], is_same_on_all_ranks=True)
    try:
        yield events
    finally:
        for descriptor in held:
            os.close(descriptor)


def _take(folder: Path, held: list[int]) -> tuple[list[str], str]:
    """Take the lock; return what is to be told, and why the folder cannot be used ("" if it can)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folders := [name for name in RUN_FILES if (folder / name).is_dir()]:
            return [], f"{', '.join(folders)} in it: a file is written there, and it is a folder; move it away"
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        return [], f"cannot be written to ({error.strerror}: {error.filename}); give another run.folder"
    held.append(descriptor)
    try:
        if not _locked(descriptor):
            return [], _other_run(_holder(descriptor))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
    except OSError as error:
        return [f"no lock on {folder} ({error.strerror}): see to it that no other run writes there"], ""
    return [], ""


def _locked(descriptor: int) -> bool:
    """Try to lock; wait only for a holder on another host, which may be gone without the server knowing it yet."""
    until = time.monotonic() + _OTHER_HOST_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (EACCES, EAGAIN):
                raise
        if _holder(descriptor)[0] in ("", socket.gethostname()) or time.monotonic() > until:
            return False
        time.sleep(1.0)


def _holder(descriptor: int) -> tuple[str, str]:
    """Return host and process id of who holds the lock, as the file says."""
    host, _, process = os.pread(descriptor, 200, 0).decode(errors="replace").strip().partition(" ")
    return host, process


def _other_run(holder: tuple[str, str]) -> str:
    who = f" (process {holder[1]} on {holder[0]})" if all(holder) else ""
    return f"another run is at work there{who}; wait for its end, or give this run another run.name or run.folder"
