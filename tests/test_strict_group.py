"""NCCL's rules hold on gloo: each rule, broken once, is told with rank, group, call and both sides."""

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import strict_group
import torch
import torch.distributed as dist
from engine_cases import dense_config, forward_backward, start
from rank_pool import RankFailed, run_mesh, run_ranks
from strict_order import disagreements

from meshwright.parallel.apply import Plan
from meshwright.parallel.mesh import Axis, Mesh, Sizes
from meshwright.parallel.tally import gather_texts


def complaint(case: Callable[..., object], size: int = 2) -> str:
    """Run a case that breaks a rule, and return what is said."""
    with pytest.raises(RankFailed) as caught:
        run_ranks(size, case)
    return str(caught.value)


def strided(world: Axis) -> None:
    dist.all_reduce(torch.ones(4, 4).t()[:2], group=world.group)


def strange_type(world: Axis) -> None:
    dist.broadcast(torch.ones(4, dtype=torch.int16), 0, group=world.group)


def strange_reduction(world: Axis) -> None:
    dist.all_reduce(torch.ones(4, dtype=torch.int32), op=dist.ReduceOp.BOR, group=world.group)


def two_devices(world: Axis) -> None:
    dist.all_gather_single(torch.ones(8, device="meta"), torch.ones(4), group=world.group)


def any_sender(world: Axis) -> None:
    dist.recv(torch.ones(4), group=world.group)


def objects_in_a_step(world: Axis) -> None:
    with strict_group.inside_a_step():
        dist.all_gather_object([None, None], {"a": 1}, group=world.group)


def caught_by_the_case(world: Axis) -> None:
    try:
        strided(world)
    except AssertionError:
        return


def not_waited_for(world: Axis) -> None:
    dist.all_reduce(torch.ones(4), group=world.group, async_op=True)


def past_the_wrapper(world: Axis) -> None:
    ops = torch.ops._c10d_functional
    ops.wait_tensor(ops.all_reduce(torch.ones(4), "sum", world.group.group_name))


def outsider(world: Axis) -> None:
    group = dist.new_group([0])
    dist.all_reduce(torch.ones(4), group=group)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (strided, r"rank 0, test_strict_group.py:\d+: call 1 of group \S+, all_reduce \(ranks \[0, 1\]\): a tensor"
         r" \[2, 4\] with strides \[1, 4\]: not contiguous"),
        (strange_type, r"call 1 of group \S+, broadcast \(ranks \[0, 1\]\): NCCL has no torch.int16"),
        (strange_reduction, "NCCL has no reduction BOR"),
        (two_devices, r"all_gather .*: tensors on \['cpu', 'meta'\]: more than one device"),
        (any_sender, "recv_anysource .*: NCCL has no such call"),
        (objects_in_a_step, r"rank 1, test_strict_group.py:\d+: a collective of Python objects inside a step"),
        (caught_by_the_case, "not contiguous"),
        (not_waited_for, r"rank 1: never waited for: call 1 of group \S+, all_reduce"),
        (past_the_wrapper, r"gloo was called past torch.distributed .*: \{'\S+': 1\}"),
        (outsider, "rank 1, .*: all_reduce: this rank is not in the group"),
    ],
)  # fmt: skip
def test_a_rank_that_breaks_a_rule_is_named(case: Callable[..., object], text: str) -> None:
    assert re.search(text, complaint(case))


def two_types(world: Axis) -> None:
    dist.all_reduce(torch.ones(4, dtype=(torch.float32, torch.int32)[world.rank]), group=world.group)


def two_shapes(world: Axis) -> None:
    dist.all_reduce(torch.ones(((2, 3), (3, 2))[world.rank]), group=world.group)


def two_reductions(world: Axis) -> None:
    dist.all_reduce(torch.ones(4), op=(dist.ReduceOp.SUM, dist.ReduceOp.MAX)[world.rank], group=world.group)


def two_roots(world: Axis) -> None:
    dist.broadcast(torch.ones(4), world.rank, group=world.group)


def two_orders(world: Axis) -> None:
    calls = [lambda: dist.all_reduce(torch.ones(4)), lambda: dist.all_gather_single(torch.ones(8), torch.ones(4))]
    for call in calls[:: (1, -1)[world.rank]]:
        call()


def one_call_less(world: Axis) -> None:
    if world.rank == 0:
        dist.all_reduce(torch.ones(4), group=world.group)


def other_counts(world: Axis) -> None:
    # The byte counts agree, so that gloo is content: 2 rows of 4 bytes against 1 row of 8.
    x, out = ((torch.ones(2, 1), torch.ones(2, 1)), (torch.ones(1, 2), torch.ones(1, 2)))[world.rank]
    there = len(x)
    counts = ([0, there], [0, there]) if world.rank == 0 else ([there, 0], [there, 0])
    dist.all_to_all_single(out, x, *counts, group=world.group)


def other_message(world: Axis) -> None:
    if world.rank == 0:
        dist.send(torch.ones(4), 1, group=world.group)
    else:
        dist.recv(torch.ones(2, dtype=torch.float64), 0, group=world.group)


def send_first(world: Axis) -> None:
    # gloo buffers what is sent; NCCL waits for the receive, which is behind the other's send.
    works = [dist.isend(torch.ones(4), 1 - world.rank), dist.irecv(torch.ones(4), 1 - world.rank)]
    for work in works:
        work.wait()


def crossed_with_a_collective(world: Axis) -> None:
    if world.rank == 0:
        work = dist.isend(torch.ones(4), 1)
        dist.all_reduce(torch.ones(4))
    else:
        pending = dist.all_reduce(torch.ones(4), async_op=True)
        work = dist.irecv(torch.ones(4), 0)
        pending.wait()
    work.wait()


def one_waits_in_a_sum(world: Axis) -> None:
    if world.rank == 0:
        dist.all_reduce(torch.ones(4))
    else:
        dist.recv(torch.ones(4), 0)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (two_types, r"rank 0, call 1 of group \S+, all_reduce, at test_strict_group.py:\d+: all_reduce SUM"
         r" float32\[4\]; rank 1, .*: all_reduce SUM int32\[4\]"),
        (two_shapes, r"all_reduce SUM float32\[2, 3\]; rank 1, .* all_reduce SUM float32\[3, 2\]"),
        (two_reductions, r"SUM float32\[4\]; rank 1, .*MAX float32\[4\]"),
        (two_roots, r"broadcast root 0 float32\[4\]; rank 1, .*broadcast root 1"),
        (two_orders, r"rank 0, call 1 .* all_reduce SUM .*; rank 1, call 1 .*: all_gather float32\[4\]"),
        (one_call_less, r"would wait for ever: rank 0 in call 1 .*; rank 1 makes no further call"),
        (other_counts, r"rank 0, .*all_to_all of float32\[0, 1\]; rank 1, .*all_to_all of float32\[0, 2\]"),
        (other_message, r"send to 1 of float32\[4\]; rank 1, .*receive from 0 of float64\[2\]"),
        (send_first, "would wait for ever: rank 0 in .*: send to 1 of .*; rank 1 in .*: send to 0 of"),
        (crossed_with_a_collective, "would wait for ever: rank 0 in .*: send to 1 .*; rank 1 in .*: all_reduce SUM"),
        (one_waits_in_a_sum, "would wait for ever: rank 0 in .*: all_reduce SUM .*; rank 1 in .*: receive from 0"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit_are_told_apart(case: Callable[..., object], text: str) -> None:
    began = time.monotonic()
    assert re.search(text, complaint(case))
    assert time.monotonic() - began < 30, "found by comparing, not by gloo's time running out"


def uneven(world: Axis, rows_back: int) -> None:
    counts = ([1, 3], [1, 2])[world.rank], ([1, 1], [rows_back, 2])[world.rank]
    send = [counts[0][0], counts[0][1]]
    receive = ([1, 1], [3, 2])[world.rank]
    dist.all_to_all_single(torch.ones(sum(receive), 2), torch.ones(sum(send), 2), receive, send, group=world.group)


def as_one_batch(world: Axis) -> float:
    x, out = torch.full((4,), float(world.rank)), torch.ones(4)
    ops = [dist.P2POp(dist.isend, x, 1 - world.rank), dist.P2POp(dist.irecv, out, 1 - world.rank)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    dist.all_reduce(out)
    return out.sum().item()


def test_what_nccl_takes_is_taken() -> None:
    assert run_ranks(2, as_one_batch) == [4.0, 4.0]
    run_ranks(2, uneven, 1)


def p2p_line(op: str, peer: int, to_come: int) -> dict[str, Any]:
    place = {"group": "g", "ranks": [0, 1], "call": "call 1", "at": "here"}
    return {**place, "op": op, "peer": peer, "what": "float32[4]", "batch": 1, "to_come": to_come}


def test_ranks_in_the_middle_of_a_batch_do_not_wait_for_each_other() -> None:
    halves = [[p2p_line("send", 1 - rank, to_come=1)] for rank in range(2)]
    assert disagreements(halves, ended=set()) == []
    assert "would wait for ever" in disagreements(halves, ended={0, 1})[0]
    whole = [[*half, p2p_line("recv", 1 - rank, to_come=0)] for rank, half in enumerate(halves)]
    assert disagreements(whole, ended={0, 1}) == []
    sends = [[p2p_line("send", 1 - rank, to_come=0)] for rank in range(2)]
    assert "would wait for ever" in disagreements(sends, ended=set())[0]


def texts_inside_an_engines_step(mesh: Mesh, finish: bool) -> list[str]:
    run = start(mesh, dense_config(num_layers=1), Plan(stage=1))
    forward_backward(run, 0, 4)
    if finish:
        run.engine.publish_weights()
    return gather_texts([str(mesh.rank)], mesh)


def test_a_step_lasts_from_its_first_micro_batch_until_the_weights_are_published() -> None:
    assert run_mesh(Sizes(dp_shard=2), texts_inside_an_engines_step, True) == [["0", "1"]] * 2
    with pytest.raises(RankFailed, match="a collective of Python objects inside a step"):
        run_mesh(Sizes(dp_shard=2), texts_inside_an_engines_step, False)


def unequal_on_an_axis(mesh: Mesh) -> None:
    dist.all_reduce(torch.ones(1 + mesh.rank // 2), group=mesh.ep.group)
    dist.all_reduce(torch.ones(1 + mesh.rank), group=mesh.edp.group, op=dist.ReduceOp.MAX)


def test_a_group_is_called_by_its_axes() -> None:
    with pytest.raises(RankFailed, match=r"group \S+ over the ranks \[0, 2\]: rank 0, call 1 of edp, all_reduce"):
        run_mesh(Sizes(dp_shard=4, ep=2), unequal_on_an_axis)
