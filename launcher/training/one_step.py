"""One step: count its tokens, forward and backward by micro-batches, reduce, clip, update.

count      the counted tokens of the whole batch, summed over the data ranks before the first forward
forward,   each micro-batch's loss is its sum divided by that count; gradients are summed, in order, and
backward   leave for the other ranks while the last micro-batch's backward runs; with a pipeline in its schedule's order
norm       of the whole gradient, over every axis; the tally with losses, loads and flags is summed
update     unless the loss is no number or the norm spikes: clip, AdamW, bring the weights back
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.data.batches import Batch
from meshwright.launcher.build import Run
from meshwright.launcher.observe.clock import StepClock
from meshwright.launcher.observe.metrics import memory_in_use
from meshwright.launcher.training.stopping import Signals, SpikeGuard, is_finite
from meshwright.model.stage import MicroBatch, StagePart
from meshwright.parallel.collectives import all_reduce
from meshwright.parallel.context.order import zigzag_positions
from meshwright.parallel.grad_norm import clip_gradients, gradient_norm
from meshwright.parallel.tally import Tally
from meshwright.parallel.where import Where, place


@dataclass(frozen=True)
class StepResult:
    """What a step showed, the same on every rank but for `local_loss`."""

    loss: float
    grad_norm: float
    tokens: int
    sums: dict[str, Tensor]
    local_loss: float
    is_finite: bool
    skipped: bool


def one_step(
    run: Run, batch: Batch, step: int, learning_rate: float, *, guard: SpikeGuard, signals: Signals, clock: StepClock
) -> StepResult:
    """Make one update of the weights from this rank's part of the step's batch."""
    inputs = to_device(batch, run.device)
    tokens = count_over_data(run, inputs.counted)
    with clock.lap("forward_backward"):
        local_loss = forward_backward(run, inputs, step, tokens)
        run.engine.finish_gradients()
        norm = gradient_norm(run.engine.parts.values(), run.mesh.pp, at_once=run.limits.squares)

    run.tally.add("loss", local_loss)
    run.tally.add(f"memory.{run.mesh.rank}", float(memory_in_use(run.device)))
    signals.raise_flags(run.tally)
    sums = run.tally.reduce(run.mesh)
    loss = sums["loss"].item()

    finite = is_finite(loss, norm)
    skipped = finite and guard.is_spike(norm)
    with clock.lap("optimizer"):
        if finite and not skipped:
            clip_gradients(run.engine.parts.values(), norm, run.run_file.train.clip_norm)
            run.optimizer.step(learning_rate)
            run.engine.publish_weights()
    if finite:
        run.finish_step(sums)
    return StepResult(loss, norm, int(tokens), sums, local_loss, finite, skipped)


@dataclass(frozen=True)
class Inputs:
    """A batch as the model takes it, sequence first, on the device."""

    tokens: Tensor
    targets: Tensor
    document: Tensor
    sample: Tensor
    counted: Tensor


def to_device(batch: Batch, device: torch.device) -> Inputs:
    """Shift tokens against targets, put the sequence first, and move to the device.

    A negative token is no target; as an input it is read as token 0.
    """
    tokens = torch.from_numpy(batch.tokens).T.to(device, non_blocking=True)
    document = torch.from_numpy(batch.document).T.to(device, non_blocking=True)
    targets = tokens[1:].contiguous()
    return Inputs(
        tokens[:-1].clamp(min=0),
        targets,
        document[:-1].contiguous(),
        torch.from_numpy(batch.sample).to(device),
        targets >= 0,
    )


def count_over_data(run: Run, counted: Tensor) -> float:
    """Return the counted tokens of all ranks' batches together."""
    count = counted.sum()
    all_reduce(count, run.mesh.dp)
    return float(count.item())


def forward_backward(run: Run, inputs: Inputs, step: int, step_tokens: float) -> float:
    """Run the batch in micro-batches; return this rank's share of the loss."""
    run.model.train()
    micro_batches = micro_batches_of(run, inputs, step, step_tokens)
    run.engine.start_step(len(micro_batches))
    if run.pipeline is not None:
        start_stages(run, micro_batches, run.tally)
        return float(run.pipeline.step(len(micro_batches), activations_of(run, micro_batches[0])).item())
    total = torch.zeros((), dtype=torch.float64 if run.device.type != "mps" else torch.float32, device=run.device)
    for each in micro_batches:
        with autocast(run):
            loss = run.model(each.tokens, each.targets, each.where, run.tally)
        loss.backward()
        total += loss.detach()
    return float(total.item())


def micro_batches_of(run: Run, inputs: Inputs, step: int, step_tokens: float) -> list[MicroBatch]:
    """Cut a rank's part of the batch into what is computed at once."""
    size = run.run_file.train.micro_batch_size
    starts = range(0, inputs.tokens.shape[1], size)
    return [micro_batch_of(run, inputs, slice(start, start + size), step, step_tokens) for start in starts]


def micro_batch_of(run: Run, inputs: Inputs, part: slice, step: int, step_tokens: float) -> MicroBatch:
    """Return some samples as the model takes them, those of their tokens that a mixer of this rank sees."""
    where = where_of(run, inputs, part, step, step_tokens)
    tokens, targets = (whole[where.position_mixed, part] for whole in (inputs.tokens, inputs.targets))
    return MicroBatch(tokens, targets, where)


def start_stages(run: Run, micro_batches: Sequence[MicroBatch], tally: Tally | None) -> None:
    """Tell this rank's stages what the next step is about."""
    assert run.pipeline is not None
    products = (run.device.type, torch.bfloat16) if run.run_file.train.precision == "bf16_autocast" else None
    for part in run.pipeline.parts.values():
        assert isinstance(part, StagePart)
        part.start_step(micro_batches, tally, products)


def activations_of(run: Run, micro_batch: MicroBatch) -> tuple[int, int, int]:
    """Return the shape of what goes from stage to stage: the tokens held between layers."""
    where = micro_batch.where
    return len(where.position), len(where.sample), run.run_file.model.hidden_size


def where_of(run: Run, inputs: Inputs, part: slice, step: int, step_tokens: float) -> Where:
    """Return the place of a micro-batch's tokens; of the samples, which are whole, each rank takes its positions."""
    return place(
        inputs.sample[part],
        inputs.document[:, part],
        inputs.counted[:, part],
        zigzag_positions(inputs.tokens.shape[0], run.mesh.cp).to(run.device),
        run.mesh.tp,
        step=step,
        step_tokens=step_tokens,
        seed=run.run_file.run.seed,
        mask_documents=run.run_file.data.mask_documents,
        limits=run.limits,
        whole_tokens=(inputs.tokens[:, part], inputs.targets[:, part]),
    )


def autocast(run: Run) -> AbstractContextManager[None]:
    """Return the context in which products are computed in bf16, where the run file asks for it."""
    if run.run_file.train.precision == "bf16_autocast":
        return torch.autocast(run.device.type, torch.bfloat16)
    return nullcontext()
