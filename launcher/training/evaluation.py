"""The loss on held-out documents, on any layout: the same samples each time, every token counted once.

Each rank takes a block of the samples. All ranks run the same number of micro-batches, because experts may lie on
other ranks; where a rank has fewer samples left, its micro-batch is padded with samples that do not count.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meshwright.data.batches import Batch, fetch
from meshwright.data.order import SampleOrder
from meshwright.data.store import Split
from meshwright.kernels.matmul.cross_entropy import NOT_COUNTED
from meshwright.launcher.build import Run
from meshwright.launcher.training.one_step import (
    Inputs,
    activations_of,
    autocast,
    micro_batch_of,
    start_stages,
    to_device,
)
from meshwright.model.stage import MicroBatch
from meshwright.parallel.collectives import all_reduce


@dataclass(frozen=True)
class HeldOut:
    """The samples that are evaluated: the first ones of the validation split, in an order that no seed changes."""

    split: Split
    order: SampleOrder
    samples: int

    @property
    def available(self) -> int:
        """Return how many samples are evaluated: as many as asked for, or as there are."""
        return min(self.samples, self.order.samples_per_epoch)


def evaluate(run: Run, held_out: HeldOut, step: int) -> tuple[float, int]:
    """Return the mean cross entropy of the held-out samples, in nats, and the tokens that it was measured on."""
    dp, size, total = run.mesh.dp, run.run_file.train.micro_batch_size, held_out.available
    per_rank = -(-total // dp.size)
    size = min(size, per_rank)
    rounds = -(-per_rank // size)
    first = dp.rank * per_rank
    mine = range(min(first, total), min(first + per_rank, total))
    sums = torch.zeros(2, dtype=torch.float64 if run.device.type != "mps" else torch.float32, device=run.device)
    run.model.eval()
    batches = (_padded(held_out, mine[at * size : (at + 1) * size], size, run) for at in range(rounds))
    cut = (micro_batch_of(run, one, slice(None), step, 1.0) for one in batches)
    with torch.no_grad():
        sums += _one_by_one(run, cut, sums) if run.pipeline is None else _through_stages(run, list(cut), sums)
    all_reduce(sums, run.mesh.world)  # each rank has the loss and the number of the tokens that it holds
    run.model.train()
    return float(sums[0] / sums[1]), int(sums[1])


def _one_by_one(run: Run, micro_batches: Iterable[MicroBatch], like: Tensor) -> Tensor:
    """Return the summed loss and the counted tokens; a micro-batch is read when its turn is."""
    sums = torch.zeros_like(like)
    for each in micro_batches:
        with autocast(run):
            loss = run.model(each.tokens, each.targets, each.where)
        sums += torch.stack((loss.to(sums), each.where.counted.sum().to(sums)))
    return sums


def _through_stages(run: Run, micro_batches: list[MicroBatch], like: Tensor) -> Tensor:
    """Return the same through a pipeline: the loss where its last stage is, the tokens where its first rank is."""
    assert run.pipeline is not None
    sums = torch.zeros_like(like)
    start_stages(run, micro_batches, tally=None)
    for loss in run.pipeline.evaluate(len(micro_batches), activations_of(run, micro_batches[0])):
        sums[0] += loss[0].to(sums)
    if run.mesh.pp.rank == 0:
        sums[1] = sum(int(each.where.counted.sum()) for each in micro_batches)
    return sums


def _padded(held_out: HeldOut, samples: range, size: int, run: Run) -> Inputs:
    """Read samples; fill up to `size` with the split's first sample, whose targets then do not count."""
    read = fetch(held_out.split, held_out.order, range(samples.start, samples.stop) if samples else range(1))
    rows = torch.arange(size).clamp(max=len(read.sample) - 1).numpy()
    inputs = to_device(Batch(read.tokens[rows], read.document[rows], read.sample[rows]), run.device)
    # Not in place: the targets of a batch of one sample are a view of its tokens.
    counts = torch.arange(size, device=run.device) < len(samples)
    return replace(inputs, targets=torch.where(counts, inputs.targets, NOT_COUNTED), counted=inputs.counted & counts)
