"""Saving: all ranks write their parts aside, and rank 0 makes a checkpoint of it, or nothing stays of it.

    plan      who writes what; the ranks' descriptions must agree                 (all ranks)
    write     each rank its parts into one file, hashed on the way, fsynced       (all ranks; here disks fill up)
    finish    table, state and manifest; the rename                               (rank 0)

`save_checkpoint` does it at once. `AsyncSaver` plans, copies what this rank will write to the CPU, and does the
rest in a thread over a process group of its own, while training goes on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from meshwright.parallel.checkpoint.agree import CheckpointError, Ranks, new_ranks, ranks_of
from meshwright.parallel.checkpoint.describe import HeldPart
from meshwright.parallel.checkpoint.durable import FileSeal, write_file
from meshwright.parallel.checkpoint.folder import (
    STATE_NAME,
    Keep,
    Manifest,
    begin,
    commit,
    discard,
    json_state,
    retain,
)
from meshwright.parallel.checkpoint.plan import PartSavePlanner
from meshwright.parallel.checkpoint.storage import FolderWriter
from meshwright.parallel.mesh import Mesh


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, HeldPart | Tensor],
    state: dict[str, Any],
    mesh: Mesh,
    fingerprint: str,
    keep: Keep | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Write the checkpoint of a step and return its path; every rank must call this.

    `tensors` is what this rank holds, by global name; on more than one rank each must be described (`describe`).
    `state` is small values (position in the data, schedule, run file); rank 0's is written. With `keep`, older
    checkpoints that need not stay are removed afterwards; `tell` is called with each that could not be.

    Raises:
        CheckpointError: on every rank, if one of them failed; earlier checkpoints are untouched.
    """
    ranks = ranks_of(mesh)
    save = _Save(folder, step, state, fingerprint, keep, tell)
    save.plan(tensors, ranks)
    return save.write(ranks)


class AsyncSaver:
    """Writes checkpoints in the background, one at a time.

    An error of a save is raised by the next call of `save`, `wait` or `close`, on every rank. With `writes_late`
    nothing is written before that call: what training changes meanwhile would be in the checkpoint, however fast the
    machine, if no copy had been made.
    """

    def __init__(
        self,
        mesh: Mesh,
        timeout: timedelta | None = None,
        tell: Callable[[str], None] | None = None,
        *,
        writes_late: bool = False,
    ) -> None:
        """Make a process group for the background; every rank must call this. `timeout` is that group's.

        `tell` is called, from the background, with each old checkpoint that could not be removed.
        """
        self._tell, self._writes_late = tell, writes_late
        self._ranks = new_ranks(mesh, timeout)
        self._thread: Thread | None = None
        self._outcome: Path | Exception | None = None

    def save(
        self,
        folder: Path,
        step: int,
        tensors: Mapping[str, HeldPart | Tensor],
        state: dict[str, Any],
        fingerprint: str,
        keep: Keep | None = None,
    ) -> None:
        """Start what `save_checkpoint` does, after the save before it; then the tensors may be changed again."""
        self.wait()
        save = _Save(folder, step, state, fingerprint, keep, self._tell)
        save.plan(tensors, self._ranks)
        save.snapshot()
        self._thread = Thread(target=self._write, args=(save,), name=f"save of step {step}")
        if not self._writes_late:
            self._thread.start()

    def wait(self) -> Path | None:
        """Wait for the save under way and return the path of the checkpoint; None if there was none."""
        if self._thread is None:
            return None
        if self._writes_late:
            self._thread.start()
        self._thread.join()
        outcome, self._thread, self._outcome = self._outcome, None, None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        """Wait for the save under way."""
        self.wait()

    def __enter__(self) -> "AsyncSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, save: "_Save") -> None:
        try:
            self._outcome = save.write(self._ranks)
        except Exception as error:
            self._outcome = error


@dataclass(frozen=True)
class _Written:
    """What one rank wrote."""

    results: list[WriteResult]
    seals: dict[str, FileSeal]


class _Save:
    """One save, from the plan to the finished checkpoint."""

    def __init__(
        self,
        folder: Path,
        step: int,
        state: dict[str, Any],
        fingerprint: str,
        keep: Keep | None,
        tell: Callable[[str], None] | None,
    ) -> None:
        self.folder, self.step, self.fingerprint, self.keep, self.tell = folder, step, fingerprint, keep, tell
        self.state = state
        self._failed = f"the checkpoint of step {step} was not saved (earlier ones are untouched)"

    def plan(self, tensors: Mapping[str, HeldPart | Tensor], ranks: Ranks) -> None:
        """Agree on who writes what."""

        def local() -> SavePlan:
            self.state_bytes = json_state(self.state)
            self.planner = PartSavePlanner(_parts(tensors, ranks.size))
            return self.planner.create_local_plan()

        def divide(plans: list[SavePlan]) -> list[SavePlan]:
            plans, self.metadata = self.planner.create_global_plan(plans)
            return FolderWriter(self.folder).prepare_global_plan(plans)

        self.metadata = Metadata({})
        try:
            self.mine: SavePlan = ranks.divided(local, divide)
        except CheckpointError as error:
            raise CheckpointError(f"{self._failed}: {error}") from None

    def snapshot(self) -> None:
        """Copy what this rank writes, so that training may go on."""
        self.planner.snapshot(self.mine)

    def write(self, ranks: Ranks) -> Path:
        """Write, seal and rename; on a failure remove what was written."""
        aside: Path | None = None
        try:
            aside = ranks.first(lambda: begin(self.folder, self.step))
            path = ranks.together(partial(self._write_parts, aside), partial(self._finish, aside))
        except CheckpointError as error:
            if aside is not None:
                ranks.first(partial(discard, aside))
            raise CheckpointError(f"{self._failed}: {error}") from None
        if self.keep is not None:
            for problem in ranks.first(partial(retain, self.folder, self.step, self.keep)):
                if self.tell is not None:
                    self.tell(problem)
        return path

    def _write_parts(self, aside: Path) -> _Written:
        writer = FolderWriter(aside)
        if not aside.is_dir():
            raise OSError(f"{aside} is not seen here: checkpoints need a folder that all nodes share")
        results = writer.write_data(self.mine, self.planner).wait()
        return _Written(results, writer.seals)

    def _finish(self, aside: Path, written: list[_Written]) -> Path:
        writer = FolderWriter(aside)
        writer.finish(self.metadata, [of_rank.results for of_rank in written])
        seals = dict(writer.seals)
        for of_rank in written:
            seals |= of_rank.seals
        seals[STATE_NAME] = write_file(aside / STATE_NAME, self.state_bytes)
        return commit(aside, Manifest(self.step, len(written), self.fingerprint, seals))


def _parts(tensors: Mapping[str, HeldPart | Tensor], num_ranks: int) -> dict[str, HeldPart]:
    """Return every tensor as a described part.

    Raises:
        ValueError: if one is not described although there are several ranks. Nothing would tell whether it is
            whole, or one of several different parts of which only one would be kept.
    """
    parts = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, HeldPart):
            parts[name] = tensor
        elif num_ranks > 1 or isinstance(tensor, DTensor):
            raise ValueError(f"{name} is not described: pass describe(tensor, global_shape, placement, mesh, ...)")
        else:
            parts[name] = HeldPart(tensor, tuple(tensor.shape), (0,) * tensor.dim())
    return parts
