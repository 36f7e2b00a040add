"""On one GPU: every collective goes through NCCL, and every ZeRO stage trains, on a group of one rank.

The same cases run on a CPU with gloo in the usual tests, so that what is marked `gpu` differs by the device alone.
"""

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
from one_rank_cases import CASES, answer, cases_on, collectives_over_an_axis, forced_collectives, forced_training

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def alone(case: Callable[[str], Any], device: str) -> Any:
    """Run a case in a process of its own: forked for a CPU, which is fast, started anew for a GPU, which needs it."""
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(case, device, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join(60)


def test_every_collective_has_a_case() -> None:
    assert set(CASES) == collectives_over_an_axis()


@pytest.mark.parametrize("device", DEVICES)
def test_a_collective_of_one_rank_gives_back_what_was_sent(device: str) -> None:
    found = alone(forced_collectives, device)
    assert cases_on(device) <= set(found)
    assert found == dict.fromkeys(found, 0.0)


@pytest.mark.parametrize("device", DEVICES)
def test_every_stage_trains_as_one_process_does(device: str) -> None:
    found = alone(forced_training, device)
    assert found["as it is"][2] < found["as it is"][0]
    for name, losses in found.items():
        # fp32, and sums in the order of other kernels.
        assert losses == pytest.approx(found["as it is"], rel=1e-5), name
