"""What a run file names on this machine's disks: the store of [data], the folders of [run] and [init].

    check    a store that is not here yet is no problem (`meshwright prepare` may run later, or elsewhere)
    train    needs it

Only metadata is read, so that neither torch nor numpy is loaded: the store's meta.json, its tokenizer, and the sizes
of its files. What lies within them is checked when it is read.
"""

import stat
from pathlib import Path

from meshwright.data.errors import StoreError
from meshwright.data.meta import StoreMeta
from meshwright.launcher.runfile.messages import cut_short, problem
from meshwright.launcher.runfile.tables import RunFile

ANOTHER = "another would fit"


def on_disk_problems(run_file: RunFile, *, is_store_needed: bool) -> list[str]:
    """Return every reason why this run cannot start from what lies on this machine's disks."""
    return [
        *_folder_problems(run_file),
        *_store_problems(run_file, is_needed=is_store_needed),
        *_init_problems(run_file),
    ]


def store_of(run_file: RunFile) -> StoreMeta | None:
    """Return the description of the run's store, or None if it is not on this machine.

    Raises:
        StoreError: if there is a folder, and what is in it is no sound store; if the system refuses to look.
    """
    folder = Path(run_file.data.store)
    try:
        return StoreMeta.read(folder) if folder.is_dir() else None
    except OSError as error:
        raise StoreError(f"{_unseen(error)}; {ANOTHER}") from None


def _store_problems(run_file: RunFile, *, is_needed: bool) -> list[str]:
    folder = run_file.data.store
    try:
        store = store_of(run_file)
    except StoreError as error:
        return [problem("data.store", folder, line) for line in error.problems]
    if store is None:
        way_out = f"meshwright prepare --out {folder} makes one"
        return [problem("data.store", folder, "there is no such folder", way_out)] if is_needed else []
    found = [problem("data.store", folder, line) for line in store.damage(Path(folder))]
    found += store.problems(seq_len=run_file.data.seq_len)
    found += run_file.model.vocab_problems(store.vocab_size)
    every = run_file.evaluation.every
    if every > 0 and "validation" not in store.splits:
        way_out = "prepare it with --validation-fraction, or 0 would fit"
        found.append(problem("evaluation.every", every, "the store holds no validation split", way_out))
    return found


def _folder_problems(run_file: RunFile) -> list[str]:
    """Return the problem of an output folder that cannot be made, because something on its way is no folder."""
    folder = Path(run_file.run.output_folder)
    if "\0" in run_file.run.folder:
        return [problem("run.folder", str(folder), "holds a NUL, which no file system takes")]
    for path in (folder, *folder.parents):
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            continue  # to be made, or beneath what is no folder
        except OSError as error:
            return [problem("run.folder", str(folder), f"{cut_short(str(path))} {_unseen(error)}", ANOTHER)]
        if not is_folder:
            return [problem("run.folder", str(folder), f"{path} is there and is no folder", ANOTHER)]
        return []
    return []


def _init_problems(run_file: RunFile) -> list[str]:
    """Return the problem of a folder to begin from that is not there, unless the run has begun and goes on."""
    source, rule = run_file.init.source, "there is no such folder"
    if not source or _has_begun(run_file):
        return []
    try:
        if Path(source).is_dir():
            return []
    except OSError as error:
        rule = _unseen(error)
    return [problem("init.from", source, rule, "name a checkpoint, a run or an export")]


def _has_begun(run_file: RunFile) -> bool:
    try:
        return any(Path(run_file.run.output_folder, "checkpoints").glob("step_*"))
    except (OSError, ValueError):  # told of run.folder
        return False


def _unseen(error: OSError) -> str:
    """Return the rule for a path that the system refuses to look at, such as one that is too long."""
    return f"cannot be looked at: {error.strerror}"
