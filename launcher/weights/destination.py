"""Where an export goes, and the run file of an import: what stands in the way is told before anything is done.

    out.partial/     written into, then renamed; what a killed export left in it is cleared
    out/             the export; an older one gives way when the new one is whole
    out.failed/      the same, of an export that did not verify
    .out.replaced/   the older one, for the instant in which it gives way

Only what an export writes is ever removed. Anything else in one of these folders is named, and nothing is done.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path

from meshwright.data.aside import parents_of, some_of, strangers, why_no_folder

REPORT_NAME, REPORT_PAGE = "export_report.json", "export_report.md"
# What an export consists of.
EXPORT_FILE = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|model\.safetensors\.index)\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|export_report\.(json|md)"
)
# What the system says where a file cannot grow: the disk is full, a quota is used up, a limit of the process is met.
NO_ROOM = (ENOSPC, EDQUOT, EFBIG)


def destination_problems(out: Path, *, overwrite: bool, may_fail: bool) -> list[str]:
    """Return why no export can be written at `out`; `may_fail`: it is verified, and may come to stand in out.failed."""
    if why := why_no_folder(out):
        return [f"--out {out}: {why}; another folder would fit"]
    place, found = followed(out), list[str]()
    try:
        if place.exists() and any(place.iterdir()):
            found += _taken(place, overwrite)
        for folder in [partial_of(place), replaced_of(place), *([failed_of(place)] if may_fail else [])]:
            found += _in_the_way(folder)
    except OSError as error:
        return [not_written(out, "the export", error.strerror or str(error))]
    return [f"--out {out}: {line}" for line in found]


def not_written(out: Path, what: str, why: str) -> str:
    """Return the line for what cannot be written where the user wants it."""
    return f"--out {out}: {what} cannot be written ({why}); a new name in a folder of yours would fit"


def followed(out: Path) -> Path:
    """Return the folder that is replaced: of a link to a folder, that folder."""
    return out.resolve() if out.is_symlink() else out


def partial_of(out: Path) -> Path:
    """Return the folder that an export is written into."""
    return out.with_name(out.name + ".partial")


def failed_of(out: Path) -> Path:
    """Return the folder in which an export stands that did not verify."""
    return out.with_name(out.name + ".failed")


def replaced_of(out: Path) -> Path:
    """Return where an older export is for the instant in which it gives way."""
    return out.with_name(f".{out.name}.replaced")


@contextmanager
def written_partially(out: Path, num_bytes: int) -> Iterator[Path]:
    """Give the empty folder, beside the final one, that an export is written into; it goes again if the body raises.

    Raises:
        ValueError: if the system does not let an export of this size be written there.
    """
    if (free := _free_bytes(out)) is not None and free < num_bytes:
        raise ValueError(_no_room(out, "no room", num_bytes))
    partial = partial_of(out)
    try:
        with parents_of(out), _made(partial):
            yield partial
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in NO_ROOM:
            raise ValueError(_no_room(out, reason, num_bytes)) from None
        if not _is_of(error, partial):
            raise
        raise ValueError(not_written(out, "the export", reason)) from None


def finish(partial: Path, out: Path, *, passed: bool) -> Path:
    """Give a written folder its final name, in place of an older export; `.failed` where it did not verify."""
    final = out if passed else failed_of(out)
    old = replaced_of(final)
    if final.exists():
        _remove_export(old)  # of an export that was killed here
        final.rename(old)
    try:
        partial.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    # What somebody put there while this one was written stays, and the next export names it.
    _remove_export(old)
    return final


def _remove_export(folder: Path) -> None:
    """Remove a folder if it is there and holds an export alone."""
    if folder.exists() and not strangers(folder, EXPORT_FILE.fullmatch):
        shutil.rmtree(folder)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    if folder.exists():
        shutil.rmtree(folder)  # of an export that was killed; what is not an export's was refused before
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_of(error: OSError, folder: Path) -> bool:
    """Say whether an error is of a folder, of what lies in it, or of one on the way to it."""
    if error.filename is None:
        return False
    path = Path(os.fsdecode(error.filename))
    return path.is_relative_to(folder) or folder.is_relative_to(path)


def _taken(folder: Path, overwrite: bool) -> list[str]:
    """Return why an export may not take the place of a folder that is not empty."""
    if not (folder / REPORT_NAME).is_file():
        return ["is there already and is no export; give another folder"]
    if not overwrite:
        return ["holds an export already; give another folder, or --overwrite to replace it"]
    return _in_the_way(folder)


def _in_the_way(folder: Path) -> list[str]:
    """Return why a folder that is to be removed may not be: it is none, or holds what is not of an export."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return [f"goes by way of {folder}, which is there and is no folder; move it away, or give another --out"]
    if not (foreign := strangers(folder, EXPORT_FILE.fullmatch)):
        return []
    what = f"would remove {folder}, which holds what no export writes: {some_of(foreign)}"
    return [f"{what}; move it away, or give another --out"]


def _no_room(out: Path, why: str, num_bytes: int) -> str:
    free = _free_bytes(out)
    room = f"it needs at least {num_bytes:,} bytes" + (f", and {free:,} are free there" if free is not None else "")
    return f"--out {out}: the export cannot be written ({why}): {room}; a folder with more room would fit"


def _free_bytes(out: Path) -> int | None:
    """Return how many bytes may be written beside `out`; None where the file system does not say."""
    there = next(folder for folder in out.absolute().parents if folder.exists())
    usage = shutil.disk_usage(there)
    return usage.free if usage.total else None
