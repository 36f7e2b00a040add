"""A step's seconds are the wall's, and its laps lie within them."""

import time

import pytest
import torch

from meshwright.launcher.observe.clock import StepClock


def test_laps_add_up_within_a_step_and_start_again_in_the_next() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock.lap("forward_backward"):
            time.sleep(0.02)
    with clock.lap("data"):
        time.sleep(0.01)
    time.sleep(0.03)
    laps = clock.finish()
    assert 0.04 <= laps.forward_backward <= laps.total
    assert 0.01 <= laps.data <= laps.total
    assert laps.optimizer == 0.0
    assert laps.other >= 0.03
    assert laps.total == pytest.approx(laps.data + laps.forward_backward + laps.optimizer + laps.other)

    next_laps = clock.finish()
    assert next_laps.forward_backward == 0.0
    assert next_laps.total < laps.total


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_lap_is_the_devices_time_though_the_program_runs_ahead() -> None:
    clock = StepClock(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    torch.mm(x, x)
    torch.cuda.synchronize()
    clock.finish()
    began = time.perf_counter()
    with clock.lap("forward_backward"):
        for _ in range(50):
            torch.mm(x, x)
    enqueued = time.perf_counter() - began
    laps = clock.finish()
    assert enqueued < laps.forward_backward <= laps.total
