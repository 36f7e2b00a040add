"""The named numbers are what their formulas say, on numbers that a reader can check by hand."""

import math
import os

import pytest
import torch

from meshwright.launcher.observe.clock import Laps
from meshwright.launcher.observe.metrics import (
    DepthCounts,
    Meter,
    RawStep,
    expert_numbers,
    max_over_mean,
    memory_in_use,
    normalised_entropy,
)
from meshwright.launcher.observe.peak import Peak

LAPS = Laps(total=2.0, data=0.1, forward_backward=1.5, optimizer=0.3)


def raw_step(**keys: object) -> RawStep:
    values: dict[str, object] = {
        "step": 3,
        "loss": 2.5,
        "learning_rate": 1e-3,
        "grad_norm": 0.7,
        "tokens": 4000,
        "samples": 24,
        "laps": LAPS,
        "memory_bytes": 3 * 2**30,
    }
    return RawStep(**(values | keys))  # type: ignore[arg-type]


def test_throughput_and_mfu_are_shares_of_the_ranks() -> None:
    # 4000 tokens in 2 s on 4 ranks: 500 a rank; at 6e9 FLOPs each that is 3 of a rank's 12 TFLOP/s.
    numbers = Meter(4, 6e9, Peak(12e12, "somebody's peak")).numbers(raw_step())
    assert numbers["tokens_per_second"] == 2000.0
    assert numbers["tokens_per_second_per_rank"] == 500.0
    assert numbers["mfu"] == pytest.approx(0.25)
    assert numbers["mfu_of"] == "somebody's peak"
    assert numbers["memory_gib"] == 3.0


def test_seconds_in_parts_sum_to_the_step() -> None:
    numbers = Meter(1, 1.0, Peak(1.0, "")).numbers(raw_step())
    parts = ["seconds_data", "seconds_forward_backward", "seconds_optimizer", "seconds_other"]
    assert sum(float(numbers[part] or 0) for part in parts) == pytest.approx(numbers["seconds"])
    assert numbers["seconds_other"] == pytest.approx(0.1)


def test_what_the_loop_counted_is_passed_on_by_name() -> None:
    raw = raw_step(skipped=True, router_losses={"z": 0.002, "load_balancing": 0.01})
    numbers = Meter(1, 1.0, Peak(1.0, "")).numbers(raw)
    assert (numbers["step"], numbers["loss"], numbers["learning_rate"], numbers["grad_norm"]) == (3, 2.5, 1e-3, 0.7)
    assert (numbers["tokens"], numbers["samples"], numbers["skipped"]) == (4000, 24, True)
    assert (numbers["router_loss/z"], numbers["router_loss/load_balancing"]) == (0.002, 0.01)
    assert not any(name.startswith("expert") for name in numbers)


def test_the_share_that_was_dropped_is_told_only_where_something_can_be() -> None:
    meter = Meter(1, 1.0, Peak(1.0, ""))
    assert "dropped_tokens" not in meter.numbers(raw_step())
    assert meter.numbers(raw_step(dropped=4, droppable=16))["dropped_tokens"] == 0.25
    assert math.isnan(meter.numbers(raw_step(droppable=0))["dropped_tokens"])


def test_layers_for_some_tokens_are_told_for_each_token_that_came_to_them() -> None:
    meter = Meter(1, 1.0, Peak(1.0, ""))
    assert not any(name.startswith("depth") for name in meter.numbers(raw_step()))
    numbers = meter.numbers(raw_step(depth=DepthCounts(predictor_loss=40.0, right=60, chosen=16, tokens=80)))
    assert numbers["depth_predictor_loss"] == 0.5
    assert numbers["depth_predictor_right"] == 0.75
    assert numbers["depth_chosen"] == 0.2


@pytest.mark.parametrize(
    ("counts", "ratio", "entropy"),
    [
        ([5, 5, 5, 5], 1.0, 1.0),
        ([20, 0, 0, 0], 4.0, 0.0),
        ([10, 10, 0, 0], 2.0, 0.5),
        ([9], 1.0, 1.0),
        ([6, 2], 1.5, (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(2)),
    ],
)
def test_expert_load_is_1_when_even_and_known_when_not(counts: list[int], ratio: float, entropy: float) -> None:
    assert max_over_mean(counts) == pytest.approx(ratio)
    assert normalised_entropy(counts) == pytest.approx(entropy, abs=1e-12)


def test_the_worst_layer_stands_beside_every_layer() -> None:
    numbers = expert_numbers({11: [5, 5], 2: [10, 0], 5: [6, 4]})
    assert list(numbers)[:4] == ["expert_max_over_mean", "expert_entropy", *list(numbers)[2:4]]
    assert numbers["expert_max_over_mean"] == numbers["expert_max_over_mean/layer_2"] == 2.0
    assert numbers["expert_entropy"] == numbers["expert_entropy/layer_2"] == 0.0
    assert numbers["expert_max_over_mean/layer_5"] == pytest.approx(1.2)
    assert numbers["expert_entropy/layer_11"] == pytest.approx(1.0)


def test_a_layer_that_routed_nothing_has_no_load_instead_of_an_error() -> None:
    assert math.isnan(max_over_mean([0, 0]))
    assert math.isnan(normalised_entropy([0, 0]))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="compares with /proc, which Linux has")
def test_memory_of_a_cpu_rank_is_what_the_system_says() -> None:
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert memory_in_use(torch.device("cpu")) == pytest.approx(resident, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_gpu_rank_is_its_highest() -> None:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = memory_in_use(device)
    large = torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
    del large
    assert memory_in_use(device) >= before + 64 * 2**20
