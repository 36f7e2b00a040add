"""What the ranks of one layout do for the proof: train a few steps in each precision, and leave their records.

    pass      precision         learning rate   experts
    exact     fp64              the run's       as the router chooses
    start     fp64              0               as the router chooses           of one process: what it is off by
    fast      fp32              0               the reference's where its margin is within rounding
    own       the run file's    0, at last 0.1  the reference's

With a learning rate of 0 every step begins from the same weights: where a gradient is zero but for rounding, Adam
makes a whole step of the rounding, and no later step could be compared. The last update of `own`, after which nothing
is computed any more, moves every weight far enough to be another number in bf16: then what the model would compute
with next must be the masters.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch._dynamo  # here, where it is loaded once: AdamW would load it in each of the forked ranks
from torch import nn

from meshwright.kernels.limits import USUAL
from meshwright.launcher.build import Run, build_run, sizes_of, with_vocab_of
from meshwright.launcher.observe.clock import StepClock
from meshwright.launcher.proof.counted import counted_store
from meshwright.launcher.proof.cutting import narrow_limits
from meshwright.launcher.proof.dtype_of_sums import DtypeOfSums
from meshwright.launcher.proof.narrow import STEPS
from meshwright.launcher.proof.record import Array, Decide, RankRecord, Recorder, Work, computed_weights, piece_of
from meshwright.launcher.runfile.optimizer_rules import settings_of
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.training.evaluation import evaluate
from meshwright.launcher.training.learning_rate import learning_rate_at
from meshwright.launcher.training.loop import batches_of, held_out_of
from meshwright.launcher.training.one_step import one_step
from meshwright.launcher.training.progress import Progress, held_tensors
from meshwright.launcher.training.saving import Resumed, Saver, resume
from meshwright.launcher.training.stopping import Signals, SpikeGuard
from meshwright.model.feedforward.experts import Experts
from meshwright.model.mixers.attention_core import AttentionCore
from meshwright.parallel.checkpoint.agree import CheckpointError
from meshwright.parallel.mesh import Mesh, build_mesh

Precision = Literal["fp32", "bf16_autocast", "bf16", "fp64"]
ROUNDING = 1e-5
"""In fp32: how near two experts' probabilities must be for rounding to choose between them."""
_HELD_STEPS = 2
_FAR = 0.1
"""The learning rate of an update that shows in bf16, of weights near 1 too, whose neighbours are 2^-7 away."""


@dataclass(frozen=True)
class Pass:
    """One training of a few steps."""

    name: str
    precision: Precision
    steps: int = STEPS
    is_held: bool = False
    """Whether the learning rate is 0."""
    moves_at_last: bool = False
    """Whether the last update moves the weights nevertheless, so that they can be held against the masters."""
    replays: Literal["nothing", "near ties", "all"] = "nothing"
    """Which of the reference's choices of experts are taken over."""
    reference: str = ""
    """The pass, of one process, whose choices they are."""
    needed_by: frozenset[str] = frozenset()
    """The passes that this one is only for."""


def passes_of(precision: Precision) -> list[Pass]:
    """Return what every layout goes through, for a run file's precision."""
    found = [
        Pass("exact", "fp64"),
        Pass("fast", "fp32", _HELD_STEPS, is_held=True, replays="near ties", reference="fast"),
    ]
    if precision.startswith("bf16"):
        own = Pass("own", precision, _HELD_STEPS, is_held=True, moves_at_last=True, replays="all", reference="start")
        found.append(own)
    return found


def reference_passes(precision: Precision) -> list[Pass]:
    """Return what one process goes through, each pass after those that it takes choices from."""
    start = Pass("start", "fp64", _HELD_STEPS, is_held=True, needed_by=frozenset({"fast", "own"}))
    # Nothing taken over: what it chose itself is what the ranks take over where rounding decides.
    fast = Pass("fast", "fp32", _HELD_STEPS, is_held=True)
    return [Pass("exact", "fp64"), start, fast, *(one for one in passes_of(precision) if one.name == "own")]


Choices = Mapping[tuple[int, str], "Chosen"]
"""By step and layer."""


@dataclass(frozen=True)
class Chosen:
    """What one process chose for each token of a step, by its place."""

    first_sample: int
    experts: Array
    """[samples, positions, k]; -1 where a token did not come to this router."""
    margin: Array
    """[samples, positions]."""

    def taken_over(self, sample: Array, position: Array, chosen: Array, *, up_to: float) -> Array:
        """Return what was chosen for these tokens up to this margin; `chosen` elsewhere.

        Where rounding lets another token into a layer of Mixture-of-Depths, there is nothing to take over.
        """
        at = sample - self.first_sample, position
        theirs = self.experts[at]
        is_taken = (self.margin[at] <= up_to)[:, None] & (theirs >= 0)
        mixed: Array = np.where(is_taken, theirs, chosen)
        return mixed


def choices_in(record: RankRecord) -> dict[tuple[int, str], Chosen]:
    """Return what a router of one process chose, so that it can be looked up by token."""
    found = {}
    for number, step in enumerate(record.steps):
        for name, rows in step.at_tokens.items():
            layer = name.removesuffix(" experts")
            if layer == name:
                continue
            seen = step.at_tokens["tokens"]  # all of them: not every token need come to this router
            first, shape = int(seen.sample.min()), (int(np.ptp(seen.sample)) + 1, int(seen.position.max()) + 1)
            experts = np.full((*shape, rows.values.shape[1]), -1, rows.values.dtype)
            margin = np.zeros(shape)
            experts[rows.sample - first, rows.position] = rows.values
            margins = step.at_tokens[f"{layer} margin"]
            margin[margins.sample - first, margins.position] = margins.values
            found[number, layer] = Chosen(first, experts, margin)
    return found


def run_passes(
    run_file: RunFile,
    passes: Sequence[Pass],
    choices: Mapping[str, Choices],
    folder: Path | None,
    _rank: int = 0,
    *,
    is_cut: bool = False,
) -> dict[str, RankRecord]:
    """Run each pass as one of the ranks, or alone; save what the exact one ends with to `folder`.

    `is_cut`: work is cut as a large run's is (`cutting.py`).
    """
    sizes = sizes_of(run_file, torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    mesh = build_mesh(sizes, timedelta(seconds=run_file.run.timeout_seconds))
    signals = Signals()
    found: dict[str, RankRecord] = {}
    for one in passes:
        run = build(run_file, one.precision, mesh, is_cut=is_cut)
        # Alone, a pass that refers to another process's takes over those of a pass before it.
        known = choices.get(one.reference) or (choices_in(found[one.reference]) if one.reference in found else {})
        found[one.name] = train_pass(run, one, known, signals)
        if one.name == "exact" and folder is not None:
            try:
                save(run, folder, found[one.name])
            except CheckpointError as error:  # the same on every rank; the comparison of numbers says more of it
                found[one.name].not_saved = str(error)
    return found


def build(run_file: RunFile, precision: Precision, mesh: Mesh, *, is_cut: bool = False, **keys: str) -> Run:
    """Build the run, on counted tokens, in a precision; `keys` are those of [run] to change."""
    table = run_file.model_copy(
        update={
            "train": run_file.train.model_copy(update={"precision": precision}),
            "run": run_file.run.model_copy(update=keys),
        }
    )
    batches = [table.train.global_batch_size, *(entry.global_batch_size for entry in table.train.batch_ramp)]
    samples = max(*batches, table.evaluation.samples) * (table.train.steps + 1)  # a run may begin with a past
    model, seed = table.model, table.run.seed
    store = counted_store(table.data.seq_len, model.vocab_size, seed, fewest=min(batches), samples=samples)
    table = with_vocab_of(table, store)
    return build_run(table, store, mesh, torch.device("cpu"), narrow_limits(table) if is_cut else USUAL)


def train_pass(run: Run, one: Pass, choices: Choices, signals: Signals) -> RankRecord:
    """Train as the training loop does, step by step, and record."""
    record, step = RankRecord(), 0

    def decide(layer: str, sample: Array, position: Array, chosen: Array, _margin: Array) -> Array:
        up_to = np.inf if one.replays == "all" else ROUNDING
        return choices[step, layer].taken_over(sample, position, chosen, up_to=up_to)

    hook: Decide | None = decide if choices and one.replays != "nothing" else None
    recorder = Recorder(run, outputs=one.name == "exact", decide=hook)
    guard, clock = SpikeGuard(run.run_file.train.skip_norm_spike), StepClock(run.device)
    held_out = held_out_of(run) if one.name == "exact" else None
    batches = batches_of(run, 0)
    for step in range(one.steps):
        rate = learning_rate_at(step, run.run_file.train.steps, run.run_file.learning_rate)
        rate = 0.0 if one.is_held else rate
        rate = _FAR if one.moves_at_last and step + 1 == one.steps else rate
        # One step, because reading what the profiler saw takes longer than the step; on every rank, because the stages
        # of a pipeline hold different kinds of layers.
        is_first = step == 0
        with (
            _operators(record, run, is_on=is_first and one.name == "fast"),
            _sums(record, run, is_on=is_first and one.name == "own"),
        ):
            result = one_step(run, next(batches), step, rate, guard=guard, signals=signals, clock=clock)
        record.steps.append(recorder.finish(rate, result.loss, result.grad_norm, result.sums))
        record.steps[-1].share = result.local_loss
        if held_out is not None:
            record.steps[-1].evaluation = evaluate(run, held_out, step + 1)
            recorder.forget()
    batches.close()
    record.held = {name: piece_of(part) for name, part in held_tensors(run).items()}
    record.computed = computed_weights(run) if one.moves_at_last else {}
    return record


@contextmanager
def _operators(record: RankRecord, run: Run, *, is_on: bool) -> Iterator[None]:
    """Note which of torch's operators run inside, also those within operators of ours, and what this rank had to do."""
    if not is_on:
        yield
        return
    # The profiler tells what it does on stderr, at every level that it has.
    os.environ["KINETO_LOG_LEVEL"] = "99"
    with torch.autograd.profiler.profile(use_kineto=False) as seen, _work(run) as work:
        yield
    assert seen.kineto_results is not None
    record.operators = frozenset(event.name() for event in seen.kineto_results.events())
    record.work = frozenset(work)


@contextmanager
def _sums(record: RankRecord, run: Run, *, is_on: bool) -> Iterator[None]:
    """Note the sums over samples that are made inside in less than fp32."""
    if not is_on:
        yield
        return
    with DtypeOfSums(run) as sums:
        yield
    record.narrow_sums = frozenset(sums.found)


@contextmanager
def _work(run: Run) -> Iterator[set[Work]]:
    """Collect what this rank does inside: a stage may have no layer of a kind, and experts a step without a row."""
    found: set[Work] = set()

    def of_attention(module: nn.Module, given: Any) -> None:
        q, _, v, *_ = given
        if module.is_plain and q.shape[3] == v.shape[3]:  # else no flash operator has to serve
            found.add("attention")

    def of_experts(_module: nn.Module, given: Any) -> None:
        if len(given[0]):
            found.add("experts")

    of_class = {AttentionCore: of_attention, Experts: of_experts}
    hooks = [
        module.register_forward_pre_hook(look)
        for module in run.model.modules()
        for kind, look in of_class.items()
        if isinstance(module, kind)  # FSDP2 puts a class of its own before a module's
    ]
    yield found
    for hook in hooks:
        hook.remove()
    for name, part in run.engine.parts.items():
        kind = settings_of(name, part.global_shape, run.run_file.optimizer).kind
        if part.parameter.numel() and kind == "adamw":
            found.add("adamw")


def save(run: Run, folder: Path, record: RankRecord) -> None:
    """Write a checkpoint of the run into a folder of the proof's, as training does."""
    run.run_file = run.run_file.model_copy(update={"run": run.run_file.run.model_copy(update={"folder": str(folder)})})
    steps = len(record.steps)
    saver = Saver(run, Resumed(Progress(), []))
    saver.save(Progress(step=steps, samples=0, updates=steps))
    saver.close()


def restored(run_file: RunFile, folder: Path, _rank: int = 0) -> RankRecord:
    """Return what one process finds in the checkpoint that a layout wrote there."""
    run = build(run_file, "fp64", build_mesh(sizes_of(run_file, 1)), folder=str(folder))
    resume(run)
    return RankRecord(held={name: piece_of(part) for name, part in held_tensors(run).items()})
