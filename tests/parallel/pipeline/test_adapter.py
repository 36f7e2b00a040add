"""The adapter around torch's schedules, held to a 1F1B written by hand; forward passes alone; forms of a step."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_cases import SHAPE, Part, one_forward_one_backward
from rank_pool import run_mesh
from torch import Tensor

from meshwright.parallel.mesh import Mesh, Sizes
from meshwright.parallel.pipeline.adapter import Pipeline
from meshwright.parallel.pipeline.orders import Stages

TWO = Sizes(pp=2)
SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_zero_bubble", 2), ("zbv", 2)]
SCHEDULES += [("dualpipev", 2), ("interleaved_1f1b", 3)]
Found = tuple[float, dict[int, Tensor]]


def pipeline_of(mesh: Mesh, schedule: str, per_rank: int) -> Pipeline:
    stages = Stages(schedule, mesh.pp.size, per_rank)
    parts = {stage: Part(stage, stages.count) for stage in stages.held_by(mesh.pp.rank)}
    return Pipeline(parts, stages, mesh.pp, torch.device("cpu"), torch.float64)


def gradients(pipeline: Pipeline) -> dict[int, Tensor]:
    return {stage: part.weight.grad.clone() for stage, part in pipeline.parts.items()}


def by_schedule(mesh: Mesh, schedule: str, per_rank: int, micro_batches: int) -> Found:
    pipeline = pipeline_of(mesh, schedule, per_rank)
    return float(pipeline.step(micro_batches, SHAPE)), gradients(pipeline)


def by_hand(mesh: Mesh, per_rank: int, micro_batches: int) -> Found:
    count = mesh.pp.size * per_rank
    mine = range(mesh.pp.rank * per_rank, (mesh.pp.rank + 1) * per_rank)
    parts = {stage: Part(stage, count) for stage in mine}
    loss = one_forward_one_backward(list(parts.values()), mesh.pp, micro_batches)
    return float(loss), {stage: part.weight.grad for stage, part in parts.items()}


def together(found: list[Found]) -> Found:
    return sum(loss for loss, _ in found), {stage: grad for _, grads in found for stage, grad in grads.items()}


@pytest.mark.parametrize(("schedule", "per_rank"), SCHEDULES)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_torchs_schedules_do_what_the_one_written_by_hand_does(schedule: str, per_rank: int, ranks: int) -> None:
    sizes, micro_batches = Sizes(pp=ranks), 2 * ranks
    loss, grads = together(run_mesh(sizes, by_schedule, schedule, per_rank, micro_batches))
    judge_loss, judge_grads = together(run_mesh(sizes, by_hand, per_rank, micro_batches))
    assert loss == pytest.approx(judge_loss, rel=1e-14)
    assert grads.keys() == judge_grads.keys()
    for stage, grad in judge_grads.items():
        torch.testing.assert_close(grads[stage], grad, rtol=1e-13, atol=0.0)


def test_the_judge_is_right() -> None:
    parts = [Part(stage, 4) for stage in range(4)]
    whole = torch.zeros((), dtype=torch.float64)
    for at in range(4):
        x: list[Tensor] = []
        for part in parts:
            x = [part(*x, number=torch.tensor([at]))]
        whole = whole + x[0].sum()
    whole.backward()
    loss, grads = together(run_mesh(TWO, by_hand, 2, 4))
    assert loss == pytest.approx(whole.item(), rel=1e-14)
    for stage, grad in grads.items():
        torch.testing.assert_close(grad, parts[stage].weight.grad, rtol=1e-13, atol=0.0)


def losses(mesh: Mesh, schedule: str, per_rank: int, micro_batches: int) -> list[float]:
    return [float(loss) for loss in pipeline_of(mesh, schedule, per_rank).evaluate(micro_batches, SHAPE)]


@pytest.mark.parametrize(("schedule", "per_rank"), SCHEDULES)
def test_forward_passes_alone_take_any_number_of_micro_batches(schedule: str, per_rank: int) -> None:
    parts = [Part(stage, 2 * per_rank) for stage in range(2 * per_rank)]
    for micro_batches in (1, 2, 5):
        expected = []
        for at in range(micro_batches):
            x: list[Tensor] = []
            for part in parts:
                x = [part(*x, number=torch.tensor([at]))]
            expected.append(x[0].item())
        found = run_mesh(TWO, losses, schedule, per_rank, micro_batches)
        last = Stages(schedule, 2, per_rank).rank_of(2 * per_rank - 1)
        assert found[last] == expected
        assert found[1 - last] == []


def several(mesh: Mesh, schedule: str, per_rank: int) -> list[tuple[float, dict[int, Tensor]]]:
    """Train, evaluate, train on more micro-batches, and as at first."""
    pipeline, found = pipeline_of(mesh, schedule, per_rank), []
    for micro_batches in (4, 6, 4):
        for part in pipeline.parts.values():
            part.weight.grad = None
        found.append((float(pipeline.step(micro_batches, SHAPE)), gradients(pipeline)))
        pipeline.evaluate(3, SHAPE)
    return found


@pytest.mark.parametrize(("schedule", "per_rank"), [("1f1b", 1), ("zbv", 2)])
def test_steps_of_several_forms_and_evaluations_between_do_not_disturb_each_other(schedule: str, per_rank: int) -> None:
    of_ranks = run_mesh(TWO, several, schedule, per_rank)
    for step, micro_batches in enumerate((4, 6, 4)):
        loss, grads = together([found[step] for found in of_ranks])
        fresh_loss, fresh = together(run_mesh(TWO, by_schedule, schedule, per_rank, micro_batches))
        assert loss == fresh_loss
        assert all(torch.equal(grads[stage], grad) for stage, grad in fresh.items())


class Broken(torch.autograd.Function):
    """Fails, as a collective does whose other rank is gone: forward or backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: str) -> Tensor:
        if way == "forward":
            raise RuntimeError("Connection closed by peer")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError("Connection closed by peer")


class BrokenPart(torch.nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.weight = way, torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, *, number: Tensor) -> Tensor:
        return Broken.apply(self.weight * number, self.way)


def words_of_a_failure(mesh: Mesh, schedule: str, way: str, log: Path) -> str:
    """Return what is raised on one rank that holds every stage; what torch logs goes to a file."""
    handler = logging.FileHandler(log)
    logging.getLogger("torch.distributed").addHandler(handler)
    pipeline = Pipeline({0: BrokenPart(way)}, Stages(schedule, 1), mesh.pp, torch.device("cpu"), torch.float64)
    try:
        pipeline.step(2, SHAPE)
    except RuntimeError as error:
        return str(error)
    finally:
        logging.getLogger("torch.distributed").removeHandler(handler)
    return "nothing was raised"


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b"])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_what_goes_wrong_in_a_stage_is_raised_and_nothing_around_it(tmp_path: Path, schedule: str, way: str) -> None:
    log = tmp_path / "log"
    assert run_mesh(Sizes(), words_of_a_failure, schedule, way, log) == ["Connection closed by peer"]
    assert log.read_text() == ""
