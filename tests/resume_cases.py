"""A run that is saved on one layout and goes on on another, by the product's own saver, resume and step.

    train_and_save     two steps, a checkpoint
    load_and_go_on     what a rank holds as it has loaded, and after one more step
    cut                what of a global tensor a rank must hold: arithmetic of its own, beside the product's

A `Piece` is a tensor as a rank holds it, padding included, and how it was cut: its layer's splits, outermost first,
then ZeRO's chunks of dim 0. Numbers of elements do not divide, so that nearly every cut has padding or a short end.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # here, where it is loaded once: AdamW would load it in each of the forked ranks
from engine_cases import BATCH, SEQ, VOCAB
from parity_samples import Sample
from torch import Tensor
from torch.distributed.tensor import DTensor

from meshwright.launcher.build import Run, build_run
from meshwright.launcher.observe.clock import StepClock
from meshwright.launcher.proof.counted import counted_store
from meshwright.launcher.training.learning_rate import learning_rate_at
from meshwright.launcher.training.loop import batches_of
from meshwright.launcher.training.one_step import StepResult, one_step
from meshwright.launcher.training.progress import Progress
from meshwright.launcher.training.saving import Resumed, Saver, resume
from meshwright.launcher.training.stopping import Signals, SpikeGuard
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.placement import Placement

Array = np.ndarray[Any, np.dtype[Any]]
BEFORE, AFTER = 2, 1  # steps on either side of the checkpoint


@dataclass(frozen=True)
class Cut:
    """One cut of a dim: this rank's part of so many, all of one length (`is_padded`) or as `torch.chunk` has them."""

    dim: int
    parts: int
    index: int
    is_padded: bool = True


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a tensor, and how it was cut."""

    values: Array
    cuts: tuple[Cut, ...] = ()

    def of(self, whole: Array) -> Array:
        """Return what it must be, of the global tensor."""
        for each in self.cuts:
            whole = cut(whole, each)
        return whole


@dataclass
class Loaded:
    """What a rank holds as it has loaded a checkpoint, and after one more step."""

    loaded: dict[str, Piece] = field(default_factory=dict)
    later: dict[str, Piece] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def cut(whole: Array, by: Cut) -> Array:
    """Return a part of an array, with the padding that it ends in."""
    length = -(-whole.shape[by.dim] // by.parts)
    places = range(by.index * length, min((by.index + 1) * length, whole.shape[by.dim]))
    part = whole.take(list(places), axis=by.dim) if len(places) else whole.take([], axis=by.dim)
    if not by.is_padded:
        return part
    missing = [(0, length - part.shape[by.dim] if dim == by.dim else 0) for dim in range(part.ndim)]
    return np.pad(part, missing)


def build(mesh: Mesh, drawn: Sample, folder: Path) -> Run:
    """Build a sample's run, which writes to a folder."""
    run_file = drawn.run_file()
    tables = {
        "run": run_file.run.model_copy(update={"folder": str(folder)}),
        "train": run_file.train.model_copy(update={"steps": BEFORE + AFTER, "clip_norm": 0.1}),
        "learning_rate": run_file.learning_rate.model_copy(update={"peak": 0.01}),
    }
    assert (run_file.train.global_batch_size, run_file.data.seq_len) == (BATCH, SEQ)
    store = counted_store(SEQ, VOCAB, run_file.run.seed)
    return build_run(run_file.model_copy(update=tables), store, mesh, torch.device("cpu"))


def go_on(run: Run, progress: Progress, steps: int) -> list[StepResult]:
    """Make a few steps from where a run is, as the training loop does, and bring `progress` there."""
    table, results = run.run_file, list[StepResult]()
    guard, clock, signals = SpikeGuard(table.train.skip_norm_spike, progress.norms), StepClock(run.device), Signals()
    batches = batches_of(run, progress.samples)
    for _ in range(steps):
        rate = learning_rate_at(progress.step, table.train.steps, table.learning_rate)
        batch = next(batches)
        results.append(one_step(run, batch, progress.step, rate, guard=guard, signals=signals, clock=clock))
        progress.step += 1
        progress.updates += 1
        progress.samples = batches.state_dict()["samples"]
    progress.norms = list(guard.norms)
    batches.close()
    return results


def train_and_save(mesh: Mesh, drawn: Sample, folder: Path) -> Loaded:
    """Train, leave a checkpoint, and return what was held when it was written."""
    run, progress = build(mesh, drawn, folder), Progress()
    results = go_on(run, progress, BEFORE)
    saver = Saver(run, Resumed(Progress(), []))
    saver.save(progress)
    saver.close()
    return Loaded(pieces_of(run), {}, [r.loss for r in results], [r.grad_norm for r in results])


def load_and_go_on(mesh: Mesh, drawn: Sample, folder: Path) -> Loaded:
    """Go on from the checkpoint in a folder, on this layout."""
    run = build(mesh, drawn, folder)
    began = resume(run)
    assert began.progress.step == BEFORE, began.events
    loaded = pieces_of(run)
    results = go_on(run, began.progress, AFTER)
    return Loaded(loaded, pieces_of(run), [r.loss for r in results], [r.grad_norm for r in results])


def pieces_of(run: Run) -> dict[str, Piece]:
    """Return what a rank holds: what the optimizer updates, its moments, what the model computes with, buffers."""
    found = {f"buffer {name}": Piece(copied(buffer)) for name, buffer in run.buffers().items()}
    for name, part in run.engine.parts.items():
        cuts = [*splits_of(part.placement), *(zero_of(part.placement, run.mesh) if part.is_zero_part else [])]
        for what, held in {"weight": part.parameter, **run.optimizer.moments(name)}.items():
            found[f"{what} of {name}"] = Piece(copied(held), tuple(cuts))
    for name, parameter in run.model.named_parameters():
        placement = run.engine.parts[name].placement
        is_sharded = isinstance(parameter.data, DTensor)
        local = parameter.data.to_local() if isinstance(parameter.data, DTensor) else parameter
        cuts = [*splits_of(placement), *(zero_of(placement, run.mesh) if is_sharded else [])]
        found[f"computed weight of {name}"] = Piece(copied(local), tuple(cuts))
    return found


def splits_of(placement: Placement) -> list[Cut]:
    return [Cut(each.dim, each.axis.size // each.copies, each.axis.rank // each.copies) for each in placement.splits]


def zero_of(placement: Placement, mesh: Mesh) -> list[Cut]:
    axis = mesh.edp if placement.factorisation == "expert" else mesh.zero
    return [Cut(0, axis.size, axis.rank, is_padded=False)]


def copied(tensor: Tensor) -> Array:
    return tensor.detach().numpy().copy()


def differences(ranks: list[dict[str, Piece]], wholes: dict[str, Array], *, tolerance: float = 0.0) -> list[str]:
    """Return where what the ranks hold is not that of the global tensors, or leaves any of their elements out.

    A tolerance is of each tensor's largest value; without one every bit is compared.
    """
    found = []
    seen = {name: np.zeros(whole.size + 1, bool) for name, whole in wholes.items()}
    for rank, pieces in enumerate(ranks):
        for name in sorted(pieces):
            piece, whole = pieces[name], wholes[name]
            expected = piece.of(whole)
            seen[name][piece.of(np.arange(1, whole.size + 1).reshape(whole.shape))] = True
            if piece.values.shape != expected.shape:
                found.append(f"rank {rank}: {name} is {piece.values.shape}, not {expected.shape}")
            elif tolerance and expected.size:
                error = np.abs(piece.values - expected).max() / max(np.abs(whole).max(), np.finfo(np.float64).tiny)
                found += [f"rank {rank}: {name} is off by {error:.2g}"] if not error <= tolerance else []
            elif piece.values.tobytes() != expected.tobytes():
                wrong = int((piece.values != expected).sum())
                found.append(f"rank {rank}: {name} has other bits in {wrong} of {expected.size} elements")
    return found + [f"no rank holds all of {name}" for name, places in seen.items() if not places[1:].all()]
