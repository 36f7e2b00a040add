"""One step through the stages of a pipeline: torch's schedules, behind the few calls that a training loop needs.

    step       forward and backward of every micro-batch, in the order of the schedule; returns the sum of their losses
    evaluate   forward only; stage s takes micro-batch m at time s + m, so that no rank waits for one that waits for it

A stage is a module that is called with `number`, a tensor [1] that says which micro-batch it is, and, but for the first
stage, with the activations that the stage before returned; the last one returns a loss [1]. Sums are not divided by the
number of micro-batches. Activations have one shape, which is given to torch, so that no rank has to ask another for it.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from meshwright.parallel.mesh import Axis
from meshwright.parallel.pipeline.orders import Stages

Shape = tuple[int, ...]

_SCHEDULES: dict[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
# What goes wrong in a stage is raised; torch also logs the whole schedule, on every rank, before anyone can say why.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)
_ONE_STAGE = (ScheduleGPipe, Schedule1F1B)


class Pipeline:
    """The stages of this rank, and the schedule that all ranks of the pipeline follow."""

    def __init__(
        self, parts: Mapping[int, nn.Module], stages: Stages, pp: Axis, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Take the stages that this rank holds, by number; `dtype` is that of the activations between stages."""
        assert tuple(parts) == stages.held_by(pp.rank), f"rank {pp.rank} holds {stages.held_by(pp.rank)}"
        self.parts, self.stages, self.pp = parts, stages, pp
        self.device, self.dtype = device, dtype
        self._made: dict[tuple[int, Shape], Any] = {}

    @property
    def has_last(self) -> bool:
        """Say whether this rank holds the last stage, and so learns the loss."""
        return self.stages.count - 1 in self.parts

    def step(self, num_micro_batches: int, shape: Shape) -> Tensor:
        """Run a step whose activations are of `shape`; return the summed loss, 0 without the last stage."""
        schedule = self._schedule(num_micro_batches, shape)
        numbers, losses = self._numbers(num_micro_batches), list[Tensor]()
        # The target is what torch asks for beside an output; the output is the loss already.
        asked = {"target": numbers, "losses": losses} if self.has_last else {}
        try:
            schedule.step(number=numbers, **asked, **_without_outputs(schedule))
        except RuntimeError as error:
            raise _within_a_stage(error) from None
        total = torch.zeros((), dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        for loss in losses:
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, num_micro_batches: int, shape: Shape) -> list[Tensor]:
        """Return each micro-batch's loss [1] on the rank with the last stage; on the others an empty list."""
        numbers, count = self._numbers(num_micro_batches), self.stages.count
        arrived: dict[int, Tensor] = {}
        losses: list[Tensor] = []
        for time in range(count + num_micro_batches - 1):
            made: dict[int, Tensor] = {}
            for stage, part in self.parts.items():
                at = time - stage
                if 0 <= at < num_micro_batches:
                    made[stage] = part(*([arrived[stage]] if stage else []), number=numbers[at : at + 1])
            losses += [made.pop(count - 1)] if count - 1 in made else []
            arrived = self._hand_over(made, time, num_micro_batches, shape)
        return losses

    def _hand_over(self, made: dict[int, Tensor], time: int, num_micro_batches: int, shape: Shape) -> dict[int, Tensor]:
        """Send what this time's stages made, all at once with what the next time's stages take; return that."""
        ranks, rank_of, mine = self.pp.ranks, self.stages.rank_of, self.pp.rank
        sends = [
            dist.P2POp(dist.isend, out.contiguous(), ranks[rank_of(stage + 1)], self.pp.group)
            for stage, out in made.items()
            if rank_of(stage + 1) != mine
        ]
        arriving: dict[int, Tensor] = {}
        receives = []
        for stage in self.parts:
            if stage and 0 <= time + 1 - stage < num_micro_batches:
                if rank_of(stage - 1) == mine:
                    arriving[stage] = made[stage - 1]
                    continue
                arriving[stage] = torch.empty(shape, dtype=self.dtype, device=self.device)
                receives.append(dist.P2POp(dist.irecv, arriving[stage], ranks[rank_of(stage - 1)], self.pp.group))
        for work in dist.batch_isend_irecv(sends + receives) if sends or receives else []:
            work.wait()
        return arriving

    def _numbers(self, count: int) -> Tensor:
        return torch.arange(count)  # on the CPU, where a stage reads them without waiting for a GPU

    def _schedule(self, num_micro_batches: int, shape: Shape) -> Any:
        """Return the schedule for steps of this form; kept, because its first step makes buffers and connections."""
        key = num_micro_batches, shape
        if key not in self._made:
            made = [self._torch_stage(stage, part, shape) for stage, part in self.parts.items()]
            kind = _SCHEDULES[self.stages.schedule]
            held = made[0] if kind in _ONE_STAGE else made
            self._made[key] = kind(held, num_micro_batches, loss_fn=_loss_of_output, scale_grads=False)
        return self._made[key]

    def _torch_stage(self, stage: int, part: nn.Module, shape: Shape) -> PipelineStage:
        activations = torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)
        loss = torch.empty(1, dtype=self.dtype, device="meta", requires_grad=True)
        count = self.stages.count
        return PipelineStage(
            part if self.stages.splits_backward else _Plain(part),
            stage,
            count,
            self.device,
            input_args=() if stage == 0 else (activations,),
            output_args=(loss if stage == count - 1 else activations,),
            group=self.pp.group,
        )


class _Plain(nn.Module):
    """A stage whose sharding (ZeRO-2, ZeRO-3) torch's schedules do not see.

    Where they see FSDP2 they gather a whole stage and reduce it when they are through: a rank would hold whole weights
    and whole gradients. Left alone, FSDP2 gathers and reduces unit by unit, as it does without a pipeline. A schedule
    that takes backwards apart has to see it: hooks are not called there.
    """

    def __init__(self, part: nn.Module) -> None:
        """Take the stage."""
        super().__init__()
        self.part = part

    def forward(self, *activations: Tensor, number: Tensor) -> Tensor:
        """Run the stage."""
        out: Tensor = self.part(*activations, number=number)
        return out


def _within_a_stage(error: BaseException) -> BaseException:
    """Return what was raised within a stage: torch wraps it in the shapes of everything that the stage was given."""
    while type(error) is RuntimeError and "failed to run" in str(error).lower() and error.__cause__ is not None:
        error = error.__cause__
    return error


def _loss_of_output(output: Tensor, _target: Tensor) -> Tensor:
    """Return the loss that the last stage gave, as a tensor of its own: torch detaches the output in place."""
    return output.sum()


def _without_outputs(schedule: Any) -> dict[str, bool]:
    """Ask torch not to keep the outputs of a step, where it can be asked (not in 2.11's single-stage schedules)."""
    return {"return_outputs": False} if "return_outputs" in inspect.signature(schedule.step).parameters else {}
