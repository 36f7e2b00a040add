"""What a rank does for `verify-resume`: train by the product's own loop, saver and resume, and leave what it came to.

    new        begins with a past (`_PAST`), so that every value of the state is one that can be lost
    to be      saves after k steps and makes another one, then writes what it saves in the background, if it does: that
    killed     is the latest that training can find it at, and a checkpoint without a copy would hold step k + 1
    resumed    goes on from the newest checkpoint to the last step

Batches are read ahead as the run file says: the threads that do it begin here, after the rank was forked.
"""

import signal
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from meshwright.launcher.build import Run, sizes_of
from meshwright.launcher.observe.metrics import Meter, Numbers
from meshwright.launcher.observe.peak import Peak
from meshwright.launcher.observe.sinks import Sinks
from meshwright.launcher.proof.passes import Precision, build
from meshwright.launcher.proof.record import RankRecord, Recorder, computed_weights, piece_of
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.training.loop import train
from meshwright.launcher.training.progress import Progress, held_tensors
from meshwright.launcher.training.saving import Resumed, Saver, resume, state_of
from meshwright.launcher.training.stopping import Signals
from meshwright.parallel.checkpoint.folder import checkpoint_path
from meshwright.parallel.mesh import build_mesh

_PAST = Progress(
    samples=1,
    updates=1,
    skipped=2,
    norms=[1.0, 3.0, 2.0],
    changes=["begun by verify-resume"],
    kernels={"those of": "verify-resume"},
)
_GIVEN = ("run_file",)  # of the state: what the run was given, not what it came to
_MARK = "to_be_killed_"


@dataclass
class Trained(RankRecord):
    """What one rank leaves."""

    state: dict[str, Any] = field(default_factory=dict)
    """Everything that a checkpoint would say at the end beside tensors."""


def train_rank(
    run_file: RunFile, folder: Path, _rank: int, *, precision: Precision, gathers: bool, kill_after: int | None = None
) -> Trained:
    """Train as a rank, from the newest checkpoint if there is one; wait to be killed in the step after `kill_after`.

    With `gathers` the record has the weights that the model would compute the next step with.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    mesh = build_mesh(sizes_of(run_file, world), timedelta(seconds=run_file.run.timeout_seconds))
    run = build(run_file, precision, mesh, folder=str(folder))
    record, recorder = Trained(), Recorder(run, outputs=False)
    began = _begun(run)
    saver = Saver(run, began, writes_late=kill_after is not None)

    def await_kill(step: int) -> NoReturn:
        saver.close()
        if not checkpoint_path(saver.folder, step).is_dir():
            raise RuntimeError(f"step {step + 1} is made, and there is no checkpoint of step {step}")
        _mark(folder, mesh.rank).touch()
        while True:
            signal.pause()

    class Listener:
        """A sink: what the loop tells of a step belongs to what the model saw in it."""

        def write(self, numbers: Numbers) -> None:
            """Note a step, or the evaluation after it."""
            if numbers["kind"] == "evaluation":
                loss, tokens = (float(numbers[name] or 0.0) for name in ("validation_loss", "tokens"))
                record.steps[-1].evaluation = loss, int(tokens)
                recorder.forget()
            elif numbers["kind"] == "step":
                loss, rate, norm = (float(numbers[name] or 0.0) for name in ("loss", "learning_rate", "grad_norm"))
                record.steps.append(recorder.finish(rate, loss, norm, {}))
                if kill_after is not None and numbers["step"] == kill_after + 1:
                    await_kill(kill_after)

        def close(self) -> None:
            """Close nothing."""

    train(run, began.progress, saver, Sinks([Listener()]), Meter(world, 1.0, Peak(1.0, "not measured")), Signals())
    record.held = {name: piece_of(part) for name, part in held_tensors(run).items()}
    record.computed = computed_weights(run) if gathers else {}
    record.state = _end_of(run, began.progress)
    return record


def marked(folder: Path, world: int) -> bool:
    """Say whether every rank of a run waits to be killed."""
    return all(_mark(folder, rank).exists() for rank in range(world))


def _mark(folder: Path, rank: int) -> Path:
    return folder / f"{_MARK}{rank}"


def _begun(run: Run) -> Resumed:
    """Bring the run to its newest checkpoint, or let it begin as one that has a past."""
    began = resume(run)
    if began.checkpoint is not None:
        return began
    run.optimizer.set_updates(_PAST.updates)
    return Resumed(deepcopy(_PAST), [])


def _end_of(run: Run, progress: Progress) -> dict[str, Any]:
    """Return what a checkpoint would say, and what the run itself says where the saver would say something else."""
    state = state_of(run, progress) | asdict(progress)
    return {name: value for name, value in state.items() if name not in _GIVEN}
