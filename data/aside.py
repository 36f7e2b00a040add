"""A folder that is there whole or not at all: written aside, then renamed into place.

    corpus/                 the folder, once it is complete
    .corpus.preparing/      the same while it is written, locked by the process that writes it
    .corpus.replaced/       for an instant, the old one while it gives way to the new one

Whatever kills the writer, the lock goes with it; the next one to write clears what it left.

A single file, such as a run file, is written beside its place and renamed (`write_whole`). Of a writer that was killed
a file with its process id stays, which nobody reads.

Before anything is done, `why_no_folder` and `why_not_made` tell why nothing can be made at a place, and `strangers`
what lies in a folder that is to be replaced and is not its writer's.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meshwright.data.errors import DataError

# How long what was still being written when an error came may take to end.
_STRAGGLER_SECONDS = 2.0
# Names in a message.
_SHOWN = 5


def why_no_folder(out: Path, *, is_written: bool = True) -> str | None:
    """Return why there can be no folder at `out` to write into, as far as that can be seen without writing.

    Where it is there and nothing `is_written`, nobody asks whether it could be.
    """
    if out.name in ("", ".."):
        return "is the current folder, one above it, or an empty name (is a shell variable unset?)"
    try:
        if out.is_symlink() and not out.exists():
            return "is a link that leads nowhere"
        if out.exists() and not out.is_dir():
            return "is a file"
        if is_written and os.path.ismount(out):
            return "is where another disk is mounted, which no folder can take the place of; a folder in it would fit"
        return why_not_made(out) if is_written else None
    except OSError as error:
        return error.strerror


def why_not_made(out: Path) -> str | None:
    """Return why nothing can be made at `out`, as far as that can be seen without writing."""
    try:
        out.exists()  # the system refuses to look at a name that is too long
        there = next((folder for folder in out.absolute().parents if folder.exists()), out)
        if not there.is_dir():
            return f"{there} is no folder"
    except OSError as error:
        return error.strerror
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} may not be written to"


def strangers(folder: Path, is_own: Callable[[str], object]) -> list[str]:
    """Return what lies in a folder and is not its writer's, by path within it, that of a folder with a / at its end.

    `is_own` is asked of each path; what lies in a folder that is not the writer's is not listed one by one.
    """
    found = []
    for path, names, files in os.walk(folder):
        within = Path(path).relative_to(folder)
        foreign = [name for name in names if not is_own(f"{(within / name).as_posix()}/")]
        names[:] = sorted(set(names) - set(foreign))
        found += [f"{(within / name).as_posix()}/" for name in foreign]
        found += [it for name in files if not is_own(it := (within / name).as_posix())]
    return sorted(found)


def some_of(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Give an empty folder to write into; it becomes `out`, replacing what is there, unless the body raises.

    Parent folders are made as needed, and those that were made go again if the body raises. If `out` is a link, the
    folder that it leads to is replaced.

    Raises:
        DataError: if another process is writing `out` at this moment.
    """
    out = out.resolve() if out.is_symlink() else out
    with parents_of(out), _written_aside(out) as aside:
        yield aside


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all; what is no file (a pipe, a link) is written to.

    Raises:
        OSError: naming the file, which the system's own answer (a full disk) may not.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_other = path.is_symlink() or (path.exists() and not path.is_file())
        if is_other or not os.access(path.parent, os.W_OK):
            path.write_text(text, encoding="utf-8")
        else:
            _replace(path, text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name[:40]}.{os.getpid()}")  # no longer than the name, where that is very long
    try:
        aside.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, aside)
        _sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def parents_of(out: Path) -> Iterator[None]:
    """Remove again, if the body raises, the folders above `out` that are not there yet and the body makes."""
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
