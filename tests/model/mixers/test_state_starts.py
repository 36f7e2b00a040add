"""State mixers begin with the numbers of their publications: which distribution, not between which bounds alone.

Mamba-1       A = 1, 2, ... N of each channel                                   state-spaces/mamba, mamba_simple.py
Mamba-2       A even from 1 to 16, one for a head                               the same, mamba2.py
both          steps even in the logarithm from 0.001 to 0.1, behind softplus; D = 1
gated delta   A even from 0 to 16, dt_bias = 1                                  transformers, Qwen3-Next
S4D-Lin       A = -1/2 + i pi n, steps even in the logarithm from 0.001 to 0.1  state-spaces/s4, s4d.py
S4D-Real      A = -(n + 1)                                                      Gu et al. 2022
"""

from math import log, pi, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.model.mixers.gated_delta import DeltaSizes, GatedDelta
from meshwright.model.mixers.mamba1 import Mamba1, Mamba1Sizes
from meshwright.model.mixers.mamba2 import Mamba2, Mamba2Sizes, TimeStep
from meshwright.model.mixers.s4d import S4d, S4dSizes, Start
from meshwright.parallel.initialise import fill, init_rules

MANY = 4096  # heads or channels: so many draws


def start(part: nn.Module, name: str) -> Tensor:
    """Return the parameter's first values in fp64; the part itself is without memory."""
    shape = tuple(part.get_parameter(name).shape)
    held = torch.empty(shape, dtype=torch.float64)
    fill(held, init_rules(part)[name], seed=1, name=name, global_shape=shape, offset=(0,) * len(shape))
    return held


def assert_even(share: Tensor) -> None:
    """Check that numbers lie evenly from 0 to 1: what a published law makes of values drawn by it."""
    n, ordered = share.numel(), share.flatten().sort().values
    # The end of n even numbers is further than 10/n from that of the law by chance once in e^10 seeds.
    assert -1e-9 <= ordered[0].item() < 10 / n
    assert 1 - 10 / n < ordered[-1].item() <= 1 + 1e-9
    # Kolmogorov and Smirnov: n even numbers stray so far from an even staircase once in a thousand seeds.
    staircase = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (ordered - staircase).abs().max().item() < 1.95 / sqrt(n)


def even_in_the_logarithm(values: Tensor, low: float, high: float) -> Tensor:
    """Return how far each value lies from `low` to `high`, in the logarithm."""
    return (values.log() - log(low)) / (log(high) - log(low))


def mamba1() -> Mamba1:
    with torch.device("meta"):
        return Mamba1(8, Mamba1Sizes(inner_size=MANY, dt_rank=5, state_size=16, conv_kernel=4))


def mamba2(time_step: TimeStep | None = None) -> Mamba2:
    with torch.device("meta"):
        return Mamba2(8, Mamba2Sizes(MANY, head_dim=1), time_step=time_step or TimeStep())


def gated_delta() -> GatedDelta:
    with torch.device("meta"):
        return GatedDelta(8, DeltaSizes(MANY, MANY, key_head_dim=1, value_head_dim=1, conv_kernel=4))


def s4d(kind: Start = "linear") -> S4d:
    with torch.device("meta"):
        return S4d(MANY, S4dSizes(state_size=64, start=kind))


def test_mamba_1_begins_as_published() -> None:
    part = mamba1()
    counted = torch.arange(1, 17, dtype=torch.float64).expand(MANY, 16)
    torch.testing.assert_close(start(part, "A_log").exp(), counted)
    assert_even(even_in_the_logarithm(F.softplus(start(part, "dt_bias")), 0.001, 0.1))
    assert_even((start(part, "dt_up.weight") * sqrt(5) + 1) / 2)  # from -R^-1/2 to R^-1/2
    assert_even((start(part, "conv_x.weight") * sqrt(4) + 1) / 2)  # as torch's Conv1d: from -k^-1/2 to k^-1/2
    assert torch.equal(start(part, "D"), torch.ones(MANY).double())


def test_mamba_2_begins_as_published() -> None:
    part = mamba2()
    assert_even((start(part, "A_log").exp() - 1) / 15)
    assert_even(even_in_the_logarithm(F.softplus(start(part, "dt_bias")), 0.001, 0.1))
    assert torch.equal(start(part, "D"), torch.ones(MANY).double())


def test_mamba_2_begins_with_the_steps_that_its_table_asks_for() -> None:
    steps = F.softplus(start(mamba2(TimeStep(0.01, 0.5)), "dt_bias"))
    assert_even(even_in_the_logarithm(steps, 0.01, 0.5))


def test_the_gated_delta_net_begins_as_published() -> None:
    part = gated_delta()
    assert_even(start(part, "A_log").exp() / 16)  # of ours from 0.01: log(0) could come, and this is within the check
    assert torch.equal(start(part, "dt_bias"), torch.ones(MANY).double())


def test_s4d_begins_as_published() -> None:
    part = s4d()
    n = torch.arange(32, dtype=torch.float64).expand(MANY, 32)
    torch.testing.assert_close(start(part, "A_log").exp(), torch.full((MANY, 32), 0.5).double())
    torch.testing.assert_close(start(part, "A_imag"), pi * n)
    assert_even(even_in_the_logarithm(start(part, "log_dt").exp(), 0.001, 0.1))
    assert_even(torch.special.ndtr(start(part, "C") * sqrt(2)))  # complex of variance 1, a half of it in each part
    assert_even(torch.special.ndtr(start(part, "D")))


def test_real_s4d_begins_as_published() -> None:
    part = s4d("real")
    n = torch.arange(32, dtype=torch.float64).expand(MANY, 32)
    torch.testing.assert_close(start(part, "A_log").exp(), n + 1)
    assert torch.equal(start(part, "A_imag"), torch.zeros(MANY, 32).double())
