"""Forked ranks answer in order, and are gone afterwards, whatever became of them."""

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from meshwright.launcher.proof.forked import Fork, NoAnswerError, RankLostError


def total(rank: int) -> tuple[int, float]:
    x = torch.tensor(float(rank))
    dist.all_reduce(x)
    return rank, x.item()


def is_gone(fork: Fork) -> bool:
    return not any(psutil.pid_exists(process.pid or 0) for process in fork.processes)


def test_ranks_meet_and_answer_in_order() -> None:
    with Fork(3, total) as ranks:
        assert ranks.answers(30.0) == [(0, 3.0), (1, 3.0), (2, 3.0)]
        folder = Path(ranks._folder.name)
        assert folder.exists()
    assert is_gone(ranks)
    assert not folder.exists()


def failing(rank: int) -> object:
    if rank == 1:
        raise ValueError("no such\nthing")
    return total(rank)


def crashing(rank: int) -> object:
    if rank == 1:
        faulthandler.disable()  # pytest's, which would fill the output
        os.kill(os.getpid(), signal.SIGSEGV)
    return total(rank)


def dying(rank: int) -> object:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return total(rank)


@pytest.mark.parametrize(
    ("work", "told", "kind"),
    [
        (failing, "rank 1 of 2 failed: ValueError: no such thing", RankLostError),
        (crashing, "rank 1 of 2 was killed by SIGSEGV", RankLostError),
        (dying, "rank 1 of 2 was killed by SIGKILL", NoAnswerError),  # by the kernel, or a person: no fault of its own
    ],
)
def test_the_rank_that_failed_is_named_and_not_the_one_that_misses_it(
    work: Callable[[int], object], told: str, kind: type[RankLostError]
) -> None:
    with pytest.raises(RankLostError) as lost, Fork(2, work) as ranks:
        ranks.answers(30.0)
    assert str(lost.value) == told
    assert type(lost.value) is kind
    assert is_gone(ranks)


def waiting(rank: int) -> None:
    if rank == 1:
        time.sleep(60)
    raise RuntimeError("Timed out waiting 60000ms for send operation to complete")


def test_ranks_that_wait_for_a_stopped_one_know_nothing_of_the_layout() -> None:
    with pytest.raises(NoAnswerError, match=r"of 2 ranks \[1\] kept the others waiting"), Fork(2, waiting) as ranks:
        ranks.answers(30.0)
    assert is_gone(ranks)


def test_ranks_that_all_wait_in_vain_are_a_fault() -> None:
    with pytest.raises(RankLostError, match="Timed out") as lost, Fork(2, lambda _: waiting(0)) as ranks:
        ranks.answers(30.0)
    assert type(lost.value) is RankLostError


def test_a_rank_that_hangs_is_ended_and_told() -> None:
    with (
        pytest.raises(RankLostError, match=r"of 2 ranks \[1\] did not answer within 1 s"),
        Fork(2, lambda rank: time.sleep(60 * rank)) as ranks,
    ):
        ranks.answers(1.0)
    assert is_gone(ranks)


def test_ranks_are_killed_when_it_is_due(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        (tmp_path / str(rank)).touch()
        signal.pause()

    with Fork(2, work) as ranks:
        ranks.kill_when(lambda: all((tmp_path / str(rank)).exists() for rank in range(2)), 30.0)
        assert [process.exitcode for process in ranks.processes] == [-signal.SIGKILL] * 2


def test_a_rank_that_fails_before_it_can_be_killed_is_told() -> None:
    with pytest.raises(RankLostError, match="rank 1 of 2 failed: ValueError"), Fork(2, failing) as ranks:
        ranks.kill_when(lambda: False, 30.0)
