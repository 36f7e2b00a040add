"""A folder that is there whole or not at all: written aside, then renamed into place.

    corpus/                 the folder, once it is complete
    .corpus.preparing/      the same while it is written, locked by the process that writes it
    .corpus.replaced/       for an instant, the old one while it gives way to the new one

Whatever kills the writer, the lock goes with it; the next one to write clears what it left.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meshwright.data.errors import DataError

# How long what was still being written when an error came may take to end.
_STRAGGLER_SECONDS = 2.0


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Give an empty folder to write into; it becomes `out`, replacing what is there, unless the body raises.

    Parent folders are made as needed, and those that were made go again if the body raises. If `out` is a link, the
    folder that it leads to is replaced.

    Raises:
        DataError: if another process is writing `out` at this moment.
    """
    out = out.resolve() if out.is_symlink() else out
    with _parents_of(out), _written_aside(out) as aside:
        yield aside


@contextmanager
def _parents_of(out: Path) -> Iterator[None]:
    made = [it for it in out.parents if not it.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):  # another process has put something there, or it was never made
            for folder in made:
                folder.rmdir()
        raise


@contextmanager
def _written_aside(out: Path) -> Iterator[Path]:
    aside = out.with_name(f".{out.name}.preparing")
    replaced = out.with_name(f".{out.name}.replaced")
    lock = _lock(aside)
    try:
        _clear(aside)
        if replaced.exists() and not out.exists():
            replaced.rename(out)  # a writer was killed between the two renames: the old folder is still whole
        shutil.rmtree(replaced, ignore_errors=True)
        try:
            yield aside
            _sync_tree(aside)
        except BaseException:
            _remove(aside)
            raise
        if out.exists():
            out.rename(replaced)
        aside.rename(out)
        _sync(out.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(folder: Path) -> int:
    """Make and lock a folder; return the descriptor that holds the lock."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DataError(f"another process is writing {folder}; wait for it, or end it") from None
        # Between opening and locking, the folder may have been renamed into place by who held the lock.
        if folder.exists() and os.path.samestat(folder.stat(), os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove a folder, also while a thread of zarr, which writes several files at once, is still adding to it."""
    until = time.monotonic() + _STRAGGLER_SECONDS
    while folder.exists() and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.01)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync_tree(folder: Path) -> None:
    for path, _, names in os.walk(folder):
        for name in names:
            _sync(Path(path, name))
        _sync(Path(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
