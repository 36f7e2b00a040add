"""When a run is saved, what a checkpoint of it holds, and how it goes on from one.

    tensors   as `progress.py` says
    state     step, samples, updates, skipped, norms (of the spike guard), kernels, run file, store, tokenizer, changes

The samples consumed are the position in the data. The learning rate is a function of the step and needs no state.
A run goes on from its newest checkpoint that verifies; what may differ then is said by `runfile/resume_rules.py`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from meshwright.launcher.build import Run
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.resume_rules import compare_for_resume
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.runfile.write import write_resolved
from meshwright.launcher.training.branching import begin_from
from meshwright.launcher.training.kept_moments import kept_moments
from meshwright.launcher.training.progress import Progress, held_tensors
from meshwright.launcher.weights.saved_run import run_file_of
from meshwright.parallel.checkpoint.agree import CheckpointError, ranks_of
from meshwright.parallel.checkpoint.folder import Keep, checkpoint_path, step_of
from meshwright.parallel.checkpoint.load import Expect, load_checkpoint, read_state
from meshwright.parallel.checkpoint.save import AsyncSaver, save_checkpoint
from meshwright.parallel.checkpoint.verify import newest_that_verifies


@dataclass(frozen=True)
class Resumed:
    """Where a run begins, and what to tell of it."""

    progress: Progress
    events: list[str]
    checkpoint: Path | None = None
    """The run's own checkpoint that it goes on from."""
    passed_over: frozenset[int] = frozenset()
    """Steps of newer checkpoints that are damaged."""


class Saver:
    """Writes the checkpoints of a run."""

    def __init__(self, run: Run, began: Resumed, *, writes_late: bool = False) -> None:
        """Take the run and where it began; make the background's process group if saving is asynchronous.

        With `writes_late` the background writes nothing before it is waited for (`AsyncSaver`).
        """
        table = run.run_file.checkpoint
        self.run, self.every = run, table.every
        self.keep = Keep(table.keep_last, table.keep_every, began.passed_over)
        timeout = timedelta(seconds=run.run_file.run.timeout_seconds)
        self._problems: list[str] = []
        tell = self._problems.append
        self._background = AsyncSaver(run.mesh, timeout, tell, writes_late=writes_late) if table.asynchronous else None
        self.newest = began.checkpoint

    @property
    def folder(self) -> Path:
        """Return the folder of the checkpoints."""
        return checkpoints_of(self.run.folder)

    def is_due(self, step: int) -> bool:
        """Say whether a checkpoint is written after so many steps."""
        return self.every > 0 and step % self.every == 0

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint, or begin to in the background; return where it will be."""
        tensors, state = held_tensors(self.run), state_of(self.run, progress)
        fingerprint = model_fingerprint(self.run.run_file)
        path = checkpoint_path(self.folder, progress.step)
        # A damaged checkpoint of this very step is replaced by a whole one.
        self.keep = replace(self.keep, passed_over=self.keep.passed_over - {progress.step})
        if self._background is not None:
            self._background.save(self.folder, progress.step, tensors, state, fingerprint, self.keep)
        else:
            tell = self._problems.append
            save_checkpoint(self.folder, progress.step, tensors, state, self.run.mesh, fingerprint, self.keep, tell)
        self.newest = path
        return path

    def take_problems(self) -> list[str]:
        """Return which old checkpoints could not be removed since the last call; no reason to end the run."""
        taken = list(self._problems)
        del self._problems[: len(taken)]
        return taken

    def close(self) -> None:
        """Wait for what is still being written."""
        if self._background is not None:
            self._background.close()


def checkpoints_of(run_folder: Path) -> Path:
    """Return where a run's checkpoints lie."""
    return run_folder / "checkpoints"


def state_of(run: Run, progress: Progress) -> dict[str, Any]:
    """Return the small values of a checkpoint: the fields of `Progress`, and of what run they are."""
    return asdict(progress) | {
        "run_file": write_resolved(run.run_file),
        "store": run.store.fingerprint,
        "tokenizer": run.store.meta.tokenizer.sha256,
        "end_of_text": run.store.meta.tokenizer.end_of_text,
    }


def model_fingerprint(run_file: RunFile) -> str:
    """Return what must be equal for a checkpoint to be of this model."""
    return run_file.model.model_copy(update={"preset": ""}).model_dump_json()


def resume(run: Run, allow_change: Sequence[str] = ()) -> Resumed:
    """Bring the run to its newest checkpoint that verifies, or to the weights that it begins from, or leave it new.

    Raises:
        ConfigError: if the checkpoint is of another model, corpus or run than the run file says.
    """
    if problem := ranks_of(run.mesh).first(lambda: _folder_problem(checkpoints_of(run.folder))):
        raise _refused(str(checkpoints_of(run.folder)), [problem])
    newest = newest_that_verifies(checkpoints_of(run.folder), run.mesh)
    events = [f"passed over {path}: {'; '.join(why)}" for path, why in newest.passed_over.items()]
    if newest.path is None:
        if newest.passed_over:
            way_out = "no checkpoint is whole: restore one from a copy, or move them away to begin anew"
            raise _refused(str(checkpoints_of(run.folder)), [*events, way_out])
        source = run.run_file.init.source
        return Resumed(begin_from(run, Path(source), events) if source else Progress(), events)
    # Compared before anything is loaded: a key that differs says more than all the shapes that differ by it.
    state = read_state(newest.path, run.mesh)
    before = run_file_of(state, newest.path)
    changes, problems = compare_for_resume(before, run.run_file, allow_change)
    if state["store"] != run.store.fingerprint:
        problems.append(f"data.store = {run.run_file.data.store}: holds other tokens than those of the checkpoint")
    if problems:
        raise _refused(str(newest.path), problems)
    kept = kept_moments(before, run.run_file)
    try:
        expect = Expect(model_fingerprint(run.run_file), may_stay_unread=kept.may_stay_unread, is_verified=True)
        load_checkpoint(newest.path, kept.of(held_tensors(run)), run.mesh, expect)
    except CheckpointError as error:
        raise _refused(str(newest.path), str(error).splitlines()) from None
    progress = progress_of(state, newest.path)
    progress.updates = progress.updates if kept.keeps_updates else 0
    told = [*changes, *kept.notes]
    progress.changes += [f"step {progress.step}: {change}" for change in told]
    events.append(f"resumed at step {progress.step} from {newest.path}")
    events += [f"changed: {change}" for change in told]
    run.optimizer.set_updates(progress.updates)
    run.engine.publish_weights()
    passed_over = frozenset(step for path in newest.passed_over if (step := step_of(path)) is not None)
    return Resumed(progress, events, newest.path, passed_over)


def _folder_problem(folder: Path) -> str:
    """Say why nothing can be found at the checkpoints' place although something is there; "" if nothing is wrong."""
    if folder.is_symlink() and not folder.exists():
        return f"is a link to {folder.readlink()}, which is not there; mount it, or remove the link to begin anew"
    return "is no folder; move it away" if folder.exists() and not folder.is_dir() else ""


def progress_of(state: dict[str, Any], path: Path) -> Progress:
    """Return where a run was when it wrote this state.

    Raises:
        ConfigError: if the state is not one that this program writes.
    """
    kinds: dict[str, type] = dict.fromkeys(("step", "samples", "updates", "skipped"), int)
    kinds |= {"norms": list, "changes": list, "kernels": dict}
    wrong = [f"{name} is {state.get(name)!r}" for name, kind in kinds.items() if type(state.get(name)) is not kind]
    if wrong:
        raise _refused(f"{path}: the state in it", wrong)
    return Progress(**{each.name: state[each.name] for each in fields(Progress)})


def _refused(source: str, problems: list[str]) -> ConfigError:
    """Return the error of a resume; all ranks came to the same verdict."""
    return ConfigError(source, problems, is_same_on_all_ranks=True)
