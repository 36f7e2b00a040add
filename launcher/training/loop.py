"""The training loop, from the first step of this start to the last, to be read from top to bottom.

    read ahead -> one step -> tell -> evaluate, if due -> save, if due -> stop, if any rank was told to

A step that ended is told before anything is saved, so that metrics.jsonl never lacks a step that a checkpoint has.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from meshwright.data.batches import Batch, Batches
from meshwright.data.order import SampleOrder
from meshwright.launcher.build import Run
from meshwright.launcher.observe.clock import StepClock
from meshwright.launcher.observe.metrics import DepthCounts, Meter, RawStep
from meshwright.launcher.observe.sinks import Sinks
from meshwright.launcher.training.batch_ramp import BatchRamp
from meshwright.launcher.training.evaluation import HeldOut, evaluate
from meshwright.launcher.training.learning_rate import learning_rate_at
from meshwright.launcher.training.one_step import StepResult, one_step
from meshwright.launcher.training.progress import Progress
from meshwright.launcher.training.saving import Saver
from meshwright.launcher.training.stopping import NotANumberError, Signals, SpikeGuard, wants_save, wants_stop, way_back
from meshwright.parallel.tally import gather_texts


def train(run: Run, progress: Progress, saver: Saver, sinks: Sinks, meter: Meter, signals: Signals) -> Path | None:
    """Train to the run's last step, or until told to stop; return the newest checkpoint.

    Raises:
        NotANumberError: at the first step whose loss or gradient is not finite.
    """
    table = run.run_file.train
    guard = SpikeGuard(table.skip_norm_spike, progress.norms)
    held_out = held_out_of(run)
    batches = batches_of(run, progress.samples)
    clock = StepClock(run.device)
    try:
        while progress.step < table.steps:
            with clock.lap("data"):
                batch = next(batches)
            learning_rate = learning_rate_at(progress.step, table.steps, run.run_file.learning_rate)
            result = one_step(run, batch, progress.step, learning_rate, guard=guard, signals=signals, clock=clock)
            if not result.is_finite:
                raise not_a_number(run, batch, progress.step, result, saver)

            progress.step += 1
            progress.samples = batches.state_dict()["samples"]
            progress.updates += not result.skipped
            progress.skipped += result.skipped
            progress.norms = list(guard.norms)
            tell(run, sinks, meter, progress, result, learning_rate, clock)

            is_last = progress.step == table.steps
            stop = wants_stop(result.sums)
            if held_out is not None and (is_last or progress.step % run.run_file.evaluation.every == 0):
                loss, tokens = evaluate(run, held_out, progress.step)
                sinks.evaluation({"step": progress.step, "validation_loss": loss, "tokens": tokens})
            if is_last or stop or saver.is_due(progress.step) or wants_save(result.sums):
                sinks.event(f"saving {saver.save(progress)}")
            for problem in saver.take_problems():
                sinks.event(problem)
            if stop and not is_last:
                sinks.event(f"told to stop: ended after step {progress.step} of {table.steps}")
                break
    finally:
        batches.close()
    saver.close()
    return saver.newest


def batches_of(run: Run, first_sample: int) -> Batches:
    """Return this rank's batches from a position on."""
    data, split = run.run_file.data, run.store.splits["train"]
    return Batches(
        split,
        SampleOrder(split.num_tokens, data.seq_len, run.run_file.run.seed),
        first_sample=first_sample,
        batch_size_at=BatchRamp.of(run.run_file.train).size_at,
        rank=run.mesh.dp.rank,
        num_ranks=run.mesh.dp.size,
        prefetch=data.prefetch,
    )


def held_out_of(run: Run) -> HeldOut | None:
    """Return the samples to evaluate on, or None if the run file wants no evaluation."""
    table = run.run_file.evaluation
    if table.every == 0:
        return None
    split = run.store.splits["validation"]
    return HeldOut(split, SampleOrder(split.num_tokens, run.run_file.data.seq_len, seed=0), table.samples)


def held_out_lines(run: Run) -> list[str]:
    """Say where fewer samples are evaluated than were asked for."""
    asked, found = run.run_file.evaluation.samples, held_out_of(run)
    if found is None or found.available == asked:
        return []
    return [f"evaluation.samples = {asked:,}: the validation split has {found.available:,}, and all are used"]


def tell(
    run: Run, sinks: Sinks, meter: Meter, progress: Progress, result: StepResult, learning_rate: float, clock: StepClock
) -> None:
    """Give a step's numbers to the sinks."""
    sums, weights = result.sums, run.run_file.model.moe
    losses: dict[str, float] = {}
    counts: dict[int, Sequence[float]] = {}
    for name, value in sums.items():
        layer, _, what = name.rpartition(".")
        if what == "load":
            counts[int(layer.removeprefix("layers."))] = value.tolist()
    if weights is not None:
        of = {"load_balancing": ("balance", weights.load_balancing_weight), "z": ("z", weights.z_loss_weight)}
        for label, (entry, weight) in of.items():
            losses[label] = weight * of_layers(sums, entry)
    if further := run.run_file.model.multi_token:
        each = [float(value) for name, value in sums.items() if name.startswith("multi_token.")]
        losses["multi_token"] = further.loss_weight * sum(each) / len(each)
    raw = RawStep(
        step=progress.step,
        loss=result.loss,
        learning_rate=learning_rate,
        grad_norm=result.grad_norm,
        tokens=result.tokens,
        samples=progress.samples,
        laps=clock.finish(),
        memory_bytes=int(max(float(v) for n, v in sums.items() if n.startswith("memory."))),
        skipped=result.skipped,
        expert_counts=counts,
        router_losses=losses,
        dropped=of_layers(sums, "dropped"),
        droppable=of_layers(sums, "droppable") if any(name.endswith(".droppable") for name in sums) else None,
        depth=depth_counts(run, result),
    )
    sinks.step(meter.numbers(raw))


def of_layers(sums: dict[str, Tensor], entry: str) -> float:
    """Return what all layers tallied under one name."""
    return sum((float(value) for name, value in sums.items() if name.endswith(f".{entry}")), start=0.0)


def depth_counts(run: Run, result: StepResult) -> DepthCounts | None:
    """Return what layers for some tokens counted; None of a model without such layers."""
    if run.run_file.model.depth is None:
        return None
    loss, *counts = (of_layers(result.sums, f"depth_{what}") for what in ("predictor", "right", "chosen", "tokens"))
    return DepthCounts(loss * result.tokens, *counts)  # the loss was tallied over the step's tokens


def not_a_number(run: Run, batch: Batch, step: int, result: StepResult, saver: Saver) -> NotANumberError:
    """Return the error that names the step (its index is given), the documents at fault and the way back."""
    saver.close()
    split = run.store.splits["train"]
    is_mine = result.local_loss != result.local_loss or abs(result.local_loss) == float("inf")
    is_anyones = result.loss != result.loss or abs(result.loss) == float("inf")
    documents = dict.fromkeys(batch.document.flatten().tolist()) if is_mine or not is_anyones else {}
    named = [f"{split.origin(document)} (document {document})" for document in documents]
    together = list(dict.fromkeys(gather_texts(named, run.mesh)))  # each stage of a pipeline may have named them
    return NotANumberError(step + 1, result.loss, result.grad_norm, together, way_back(saver.newest, step))
