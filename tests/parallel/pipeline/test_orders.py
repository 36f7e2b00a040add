"""The tables are those that torch has and executes, and what a schedule does not take is known."""

from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from pipeline_cases import SHAPE, Part
from rank_pool import run_mesh
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules

from meshwright.parallel.mesh import Mesh, Sizes
from meshwright.parallel.pipeline.adapter import Pipeline
from meshwright.parallel.pipeline.orders import Action, Stages, orders_of

TORCHS = {
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}
SCHEDULES = ["gpipe", "1f1b", *TORCHS]


class Message(NamedTuple):
    """What a rank does for one message."""

    way: str
    peer: int
    what: tuple[str, int, int]
    """Forward or backward, the stage that it goes into, the micro-batch."""


def held(schedule: str) -> tuple[int, ...]:
    return {"gpipe": (1,), "1f1b": (1,), "zbv": (2,), "dualpipev": (2,)}.get(schedule, (1, 2, 3))


def torch_schedule(stages: Stages, micro_batches: int) -> Any:
    """Return torch's schedule, as the first rank makes it."""
    mine = [
        SimpleNamespace(
            stage_index=stage,
            num_stages=stages.count,
            group_size=stages.num_ranks,
            group_rank=0,
            submod=nn.Identity(),
        )
        for stage in stages.held_by(0)
    ]
    return TORCHS[stages.schedule](mine, micro_batches, loss_fn=lambda out, _: out, scale_grads=False)


def torch_table(stages: Stages, micro_batches: int) -> list[list[Action]]:
    """Return what torch's schedule says that each rank does, without idle times and communication."""
    made = torch_schedule(stages, micro_batches)
    flat = [
        [one for action in made.pipeline_order[rank] if action for one in (action.sub_actions or (action,))]
        for rank in range(stages.num_ranks)
    ]
    return [[Action(a.stage_index, a.computation_type.value, a.microbatch_index) for a in row] for row in flat]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("schedule", TORCHS)
def test_tables_are_torchs_for_every_number_of_micro_batches(schedule: str, ranks: int) -> None:
    for per_rank in held(schedule):
        stages = Stages(schedule, ranks, per_rank)
        taken = [n for n in range(1, 3 * ranks + 3) if stages.takes(n)]
        assert len(taken) >= 3
        for micro_batches in taken:
            assert orders_of(stages, micro_batches) == torch_table(stages, micro_batches)


def messages(stages: Stages, micro_batches: int) -> list[list[Message]]:
    """Return what each rank sends and takes, in the order in which torch's schedule does."""
    rows = torch_schedule(stages, micro_batches).pipeline_order_with_comms
    found: list[list[Message]] = [[] for _ in range(stages.num_ranks)]
    for rank, row in rows.items():
        for action in row:
            way, _, kind = action.computation_type.value.partition("_")
            if way in ("SEND", "RECV"):
                towards = action.stage_index + (1 if kind == "F" else -1) * (1 if way == "SEND" else -1)
                into = towards if way == "SEND" else action.stage_index
                found[rank].append(Message(way, stages.rank_of(towards), (kind, into, action.microbatch_index)))
    return found


def stand(queues: list[list[Message]]) -> list[int]:
    """Let a message pass when it is the next thing to do of both its ranks; return the ranks that then still wait."""
    left = [row[::-1] for row in queues]
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(left):
            while row and row[-1].way == "SEND":
                other = left[row[-1].peer]
                if not other or other[-1] != Message("RECV", rank, row[-1].what):
                    break
                row.pop()
                other.pop()
                moved = True
    return [rank for rank, row in enumerate(left) if row]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("schedule", TORCHS)
def test_messages_meet_where_a_send_waits_for_its_receive(schedule: str, ranks: int) -> None:
    """As with NCCL, whose sends keep no copy: both ranks of a pair have its messages in one order."""
    for per_rank in held(schedule):
        stages = Stages(schedule, ranks, per_rank)
        for micro_batches in [n for n in range(1, 3 * ranks + 3) if stages.takes(n)]:
            queues = messages(stages, micro_batches)
            assert all(queues)
            assert stand(queues) == []
            swapped = queues[0][:]
            swapped[0], swapped[-1] = swapped[-1], swapped[0]
            assert 0 in stand([swapped, *queues[1:]])


@pytest.mark.parametrize("schedule", TORCHS)
def test_what_torch_refuses_is_not_taken(schedule: str) -> None:
    refused = 0
    for ranks in (2, 3, 4):
        stages = Stages(schedule, ranks, 2)
        for micro_batches in range(1, 4 * ranks):
            try:
                torch_table(stages, micro_batches)
            except ValueError:
                refused += 1
                assert not stages.takes(micro_batches)
    assert refused or schedule == "zbv"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_micro_batch_goes_forward_and_back_once_through_each_stage(schedule: str) -> None:
    for per_rank in held(schedule):
        stages = Stages(schedule, 4, per_rank)
        did = [action for row in orders_of(stages, 8) for action in row]
        both = [(stage, at) for stage in range(stages.count) for at in range(8)]
        assert sorted((a.stage, a.micro_batch) for a in did if a.kind == "F") == both
        assert sorted((a.stage, a.micro_batch) for a in did if a.kind in "BI") == both
        assert sorted((a.stage, a.micro_batch) for a in did if a.kind in "BW") == both
        for rank, row in enumerate(orders_of(stages, 8)):
            assert {action.stage for action in row} == set(stages.held_by(rank))


def test_a_loop_hands_on_and_a_v_turns_back() -> None:
    assert [Stages("interleaved_1f1b", 3, 2).held_by(rank) for rank in range(3)] == [(0, 3), (1, 4), (2, 5)]
    assert [Stages("zbv", 3, 2).held_by(rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert [Stages("1f1b", 3).held_by(rank) for rank in range(3)] == [(0,), (1,), (2,)]


def test_the_table_of_the_module_docstring_is_right() -> None:
    rows = [" ".join(str(action)[1:] for action in row) for row in orders_of(Stages("1f1b", 2), 4)]
    assert rows == ["F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]


def executed(mesh: Mesh, schedule: str, per_rank: int, micro_batches: int) -> tuple[list[Action], float]:
    """Run a step and return what the stages of this rank were asked to do, and the loss."""
    stages = Stages(schedule, mesh.pp.size, per_rank)
    parts = {stage: Part(stage, stages.count) for stage in stages.held_by(mesh.pp.rank)}
    pipeline = Pipeline(parts, stages, mesh.pp, torch.device("cpu"), torch.float64)
    seen: list[Action] = []

    def recorded(name: str, kind: Any) -> Any:
        real = getattr(PipelineStage, name)

        def record(stage: PipelineStage, at: int, *args: Any, **named: Any) -> Any:
            seen.append(Action(stage.stage_index, kind(named), at))
            return real(stage, at, *args, **named)

        return patch.object(PipelineStage, name, record)

    with (
        recorded("forward_one_chunk", lambda named: "F"),
        recorded("backward_one_chunk", lambda named: "B" if named.get("full_backward", True) else "I"),
        recorded("backward_weight_one_chunk", lambda named: "W"),
    ):
        loss = pipeline.step(micro_batches, SHAPE)
    return seen, float(loss)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_is_executed_is_what_the_table_says(schedule: str, ranks: int) -> None:
    for per_rank in held(schedule)[-2:]:
        stages = Stages(schedule, ranks, per_rank)
        for micro_batches in [n for n in range(ranks, 3 * ranks + 1) if stages.takes(n)][:: ranks // 2]:
            found = run_mesh(Sizes(pp=ranks), executed, schedule, per_rank, micro_batches)
            assert [seen for seen, _ in found] == orders_of(stages, micro_batches)
            assert sum(loss != 0.0 for _, loss in found) == 1  # one rank has the last stage
