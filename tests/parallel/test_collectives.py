"""Collectives with and without gradients, against what one process would do with everyone's rows."""

import pytest
import torch
from rank_pool import run_ranks
from torch import Tensor

from meshwright.parallel import collectives
from meshwright.parallel.collectives import (
    DONE,
    all_gather,
    all_reduce,
    exchange_counts,
    exchange_rows,
    reduce_scatter,
    scatter_sum_of_rows,
)
from meshwright.parallel.mesh import Axis

# Rows that rank i sends to rank j; uneven, nothing from 0 to 1, nothing at all from 2.
SENT = [[2, 0, 3], [1, 4, 1], [0, 0, 0]]
RANKS = 3


def rows_of(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(sum(SENT[rank]), 5, dtype=torch.float64, generator=generator)


def expected_at(rank: int) -> Tensor:
    return torch.cat([rows_of(source).split(SENT[source])[rank] for source in range(RANKS)])


def exchange_with_gradient(axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    x = rows_of(axis.rank).requires_grad_()
    receive = exchange_counts(torch.tensor(SENT[axis.rank]), axis).tolist()
    y = exchange_rows(x, SENT[axis.rank], receive, axis)
    # The gradient of row i at rank r is 100 r + i, so that every row can be told from every other.
    above = (100.0 * axis.rank + torch.arange(len(y), dtype=torch.float64))[:, None].expand(-1, 5)
    y.backward(above)
    return torch.tensor(receive), y.detach(), x.grad


def test_rows_go_where_they_are_sent_and_their_gradients_come_back() -> None:
    found = run_ranks(RANKS, exchange_with_gradient)
    arrived_from = [[SENT[source][rank] for source in range(RANKS)] for rank in range(RANKS)]
    for rank, (receive, y, gradient) in enumerate(found):
        assert receive.tolist() == arrived_from[rank]
        assert torch.equal(y, expected_at(rank))
        wanted = []
        for target in range(RANKS):
            begin = sum(SENT[source][target] for source in range(rank))
            wanted += [100.0 * target + begin + i for i in range(SENT[rank][target])]
        assert gradient[:, 0].tolist() == wanted


def reductions(axis: Axis) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed, later = torch.full((4,), 2.0**axis.rank), torch.full((4,), 2.0**axis.rank)
    all_reduce(summed, axis)
    pending = all_reduce(later, axis, asynchronous=True)
    pending.wait()
    mine, everyones = torch.empty(2), torch.empty(2 * axis.size)
    reduce_scatter(mine, torch.arange(2.0 * axis.size) * (axis.rank + 1), axis).wait()
    all_gather(everyones, torch.tensor([10.0 * axis.rank, 10.0 * axis.rank + 1]), axis).wait()
    return summed, later, mine, everyones


def test_sums_are_sums_and_pieces_come_in_axis_order() -> None:
    for rank, (summed, later, mine, everyones) in enumerate(run_ranks(RANKS, reductions)):
        assert summed.tolist() == later.tolist() == [7.0] * 4  # 1 + 2 + 4; an average would be 7/3
        assert mine.tolist() == [6.0 * 2 * rank, 6.0 * (2 * rank + 1)]
        assert everyones.tolist() == [0, 1, 10, 11, 20, 21]


def narrow_sum(axis: Axis) -> list[float]:
    """Sum what bf16 cannot add up one after the other: 256 + 1 is 256 there."""
    mine = torch.empty(1, dtype=torch.bfloat16)
    pending = reduce_scatter(mine, torch.full((RANKS,), 1.0 if axis.rank else 256.0, dtype=torch.bfloat16), axis)
    pending.wait()
    pending.wait()
    return mine.tolist()


def test_narrow_sums_are_rounded_once() -> None:
    assert run_ranks(RANKS, narrow_sum) == [[258.0]] * RANKS


def two_ways_to_sum(axis: Axis) -> float:
    """Return how far ours is from gloo's own, called as on a GPU."""
    x = torch.randn(6 * axis.size, generator=torch.Generator().manual_seed(axis.rank))
    ours, theirs = torch.empty(6), torch.empty(6)
    reduce_scatter(ours, x, axis).wait()
    collectives._reduce_scatter_flat(theirs, x, group=axis.group, async_op=True).wait()
    return (ours - theirs).abs().max().item()


def test_a_sum_of_pieces_is_the_reduce_scatter_of_torch() -> None:
    assert max(run_ranks(RANKS, two_ways_to_sum)) < 1e-6  # fp32, three numbers of about 1 in another order


def sums_that_do_not_fit(axis: Axis) -> None:
    for out, x in ((torch.empty(2), torch.ones(8)), (torch.empty(2), torch.ones(4, dtype=torch.bfloat16))):
        with pytest.raises(AssertionError, match=r"no 2 pieces of 2|the sum of torch.bfloat16"):
            reduce_scatter(out, x, axis)


def test_what_is_summed_must_be_equal_pieces_of_one_type() -> None:
    run_ranks(2, sums_that_do_not_fit)


def empty_sum(axis: Axis) -> tuple[int, ...]:
    return tuple(scatter_sum_of_rows(torch.empty(0, 3), axis).shape)


def test_a_sum_of_nothing_is_nothing() -> None:
    assert run_ranks(2, empty_sum) == [(0, 3)] * 2


def an_asynchronous_sum_is_under_way(axis: Axis) -> bool:
    pending = all_reduce(torch.ones(4), axis, asynchronous=True)
    pending.wait()
    return pending is not DONE


def test_an_asynchronous_sum_gives_something_to_wait_for() -> None:
    assert run_ranks(2, an_asynchronous_sum_is_under_way) == [True, True]


def test_an_axis_of_one_rank_communicates_nothing() -> None:
    x, axis = torch.arange(4.0), Axis("ep")
    assert exchange_rows(x[:, None], [4], [4], axis).flatten().tolist() == x.tolist()
    assert exchange_counts(torch.tensor([3]), axis).tolist() == [3]
    for move in (reduce_scatter, all_gather):
        out = torch.empty(4)
        move(out, x, axis).wait()
        assert torch.equal(out, x)
    assert all_reduce(x, axis, asynchronous=True) is DONE
    assert x.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_an_exchange_keeps_the_type(dtype: torch.dtype) -> None:
    for found in run_ranks(2, exchanged_type, dtype):
        assert found == dtype


def exchanged_type(axis: Axis, dtype: torch.dtype) -> torch.dtype:
    return exchange_rows(torch.ones(2, 3, dtype=dtype), [1, 1], [1, 1], axis).dtype
