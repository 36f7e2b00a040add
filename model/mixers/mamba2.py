"""Mamba-2 (Dao and Gu 2024): a state for each head that decays by a learned, input-dependent step.

    x --gather--> z, x, B, C, dt        x [s, b, n d], B and C [s, b, g N], dt [s, b, n]: n heads in g groups
    x, B, C = silu(conv(x)), silu(conv(B)), silu(conv(C))          the last k tokens, channel by channel
    h[t] = exp(-exp(A_log) dt) h[t-1] + dt x B^T;   y = h C + D x        dt = softplus(dt + dt_bias)
    output(norm(y silu(z)))                                        each of the g groups of channels normalised by itself

Under tp a rank has n/tp heads with all that is theirs. Where tp exceeds g, the neighbouring ranks whose heads share a
group hold copies of its B and C, and sum the mean square of its channels in the norm, so that it is the whole group's.
Under cp a rank has two chunks of each sample: two halos for the convolutions, and the states that the chunks before
leave (parallel/sequence_state.py). In generation the state is of constant size: the last k - 1 tokens and h.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from meshwright.kernels.precision import at_least_fp32
from meshwright.kernels.states.gated_norm import gated_rms_norm
from meshwright.kernels.states.ssd import ssd, ssd_summary
from meshwright.kernels.states.ssd_step import ssd_step
from meshwright.model.config import ModelConfig
from meshwright.model.making import Making
from meshwright.model.mixers.channel_conv import ChannelConv
from meshwright.parallel.collectives import all_reduce
from meshwright.parallel.fits import check_finite, check_sizes
from meshwright.parallel.initialise import ONES, InitPolicy, InitRule
from meshwright.parallel.mesh import NO_CP, NO_TP, Axis
from meshwright.parallel.placement import Placement, Split
from meshwright.parallel.sequence_state import document_begins, halos, scale_state, states_before
from meshwright.parallel.tally import Tally
from meshwright.parallel.tensor.linear import NO_COPIES, ColumnLinear, RowLinear, column_products, copies_of, divide
from meshwright.parallel.where import Where


class Mamba2Sizes(NamedTuple):
    """How wide the mixer is inside."""

    num_heads: int
    head_dim: int
    num_groups: int = 1
    state_size: int = 128
    conv_kernel: int = 4
    chunk_size: int = 64


class TimeStep(NamedTuple):
    """How large a time step is at the beginning, and between what it stays."""

    low: float = 0.001
    high: float = 0.1
    """Heads begin between these, evenly in the logarithm."""
    limit: tuple[float, float] = (0.0, float("inf"))

    def check(self) -> None:
        """Hold the numbers to what steps can be.

        Raises:
            ValueError: naming those that they cannot.
        """
        found, (least, most) = [], self.limit
        if not 0.0 < self.low <= self.high < float("inf"):
            rule = "must be above 0 and finite, the lower one first; low = 0.001, high = 0.1 would fit"
            found.append(f"time_step.low = {self.low}, high = {self.high}: {rule}")
        if not 0.0 <= least < most:
            rule = "must be at least 0, the lower one first; (0.0, inf) would fit"
            found.append(f"time_step.limit = {self.limit}: {rule}")
        if found:
            raise ValueError("\n".join(found))


class Spread(NamedTuple):
    """The axes over which heads and samples are spread."""

    tp: Axis = NO_TP
    group_copies: Axis = NO_COPIES
    """The neighbouring ranks of tp whose heads share one group."""
    cp: Axis = NO_CP


ONE_RANK = Spread()
TIME_STEP = TimeStep()


@dataclass
class Mamba2State:
    """What generation carries from token to token."""

    tails: list[Float[Tensor, "k_less_one b _"]]
    """Of x, B and C, before their convolutions."""
    state: Float[Tensor, "b n d N"]


class GatedNorm(nn.Module):
    """norm(y silu(z)) of groups of channels that may lie on several ranks."""

    def __init__(self, channels: int, num_groups: int, eps: float, *, tp: Axis, copies: Axis) -> None:
        """Take the global number of channels; `copies` are the ranks that share a group."""
        super().__init__()
        self.group_size, self.eps = channels // num_groups, eps
        self.placement = Placement((Split(0, tp),))
        self.complete = partial(_complete, axis=copies)
        self.weight = nn.Parameter(torch.empty(channels // tp.size))

    def placements(self) -> dict[str, Placement]:
        """Say that the weight is cut by channel."""
        return {"weight": self.placement}

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return {"weight": ONES}

    def forward(self, y: Float[Tensor, "s b c"], z: Float[Tensor, "s b c"]) -> Float[Tensor, "s b c"]:
        """Gate, then normalise each group."""
        size, complete = self.group_size, self.complete
        normalised: Tensor = gated_rms_norm(y, z, self.weight, self.eps, group_size=size, complete=complete)
        return normalised


def _complete(total: Tensor, axis: Axis) -> None:
    all_reduce(total, axis)


class Mamba2(nn.Module):
    """A causal mixer of constant state."""

    def __init__(
        self,
        hidden_size: int,
        sizes: Mamba2Sizes,
        *,
        norm_eps: float = 1e-5,
        bias: bool = False,
        conv_bias: bool = True,
        time_step: TimeStep = TIME_STEP,
        init: InitPolicy | None = None,
        spread: Spread = ONE_RANK,
    ) -> None:
        """Take global sizes; `bias` gives the products one, `conv_bias` the convolutions.

        Raises:
            ValueError: if the groups do not divide the heads, tp does not divide either, or there cannot be such time
                steps or such a `norm_eps`.
        """
        super().__init__()
        check_sizes({"hidden_size": hidden_size, **sizes._asdict()})
        time_step.check()
        check_finite({"norm_eps": norm_eps}, usual=1e-5, least=0.0)
        n, d, groups, size, kernel, self.chunk_size = sizes
        divide(n, groups, what="num_heads", by="num_groups")
        tp, copies, self.cp = spread
        divide(n, tp.size, what="num_heads", by=tp.name)
        divide(groups * copies.size, tp.size, what="num_groups * copies", by=tp.name)
        self.tp, self.head_dim, self.state_size, self.time_step = tp, d, size, time_step
        init = init or InitPolicy()
        wide, narrow = init.matrix(hidden_size, n * d), init.matrix(hidden_size, groups * size)
        self.z = ColumnLinear(hidden_size, n * d, rule=wide, bias=bias, tp=tp)
        values = init.matrix(hidden_size, n * d, is_value=True)
        self.x = ColumnLinear(hidden_size, n * d, rule=values, bias=bias, tp=tp)
        self.B = ColumnLinear(hidden_size, groups * size, rule=narrow, bias=bias, tp=tp, copies=copies)
        self.C = ColumnLinear(hidden_size, groups * size, rule=narrow, bias=bias, tp=tp, copies=copies)
        self.dt = ColumnLinear(hidden_size, n, rule=init.matrix(hidden_size, n), bias=bias, tp=tp)
        self.conv_x = ChannelConv(n * d, kernel, bias=conv_bias, tp=tp)
        self.conv_B = ChannelConv(groups * size, kernel, bias=conv_bias, tp=tp, copies=copies)
        self.conv_C = ChannelConv(groups * size, kernel, bias=conv_bias, tp=tp, copies=copies)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.empty(n // tp.size)) for _ in range(3))
        self.norm = GatedNorm(n * d, groups, norm_eps, tp=tp, copies=copies)
        outward = init.matrix(n * d, hidden_size, to_residual=True)
        self.output = RowLinear(n * d, hidden_size, rule=outward, bias=bias, tp=tp)

    def placements(self) -> dict[str, Placement]:
        """Say that what there is one of for each head is cut by head."""
        return dict.fromkeys(("A_log", "D", "dt_bias"), Placement((Split(0, self.tp),)))

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins: decays exp(-dt A) with A from 1 to 16."""
        low, high, _ = self.time_step
        steps = InitRule("softplus_inverse", low=low, high=high)
        return {"A_log": InitRule("log_of_uniform", low=1.0, high=16.0), "D": ONES, "dt_bias": steps}

    def forward(
        self, x: Float[Tensor, "s_local b h"], where: Where, tally: Tally | None
    ) -> Float[Tensor, "s_local b h"]:
        """Mix each token with those before it in its sample (in its document, where `where` says so)."""
        z, dt, *convolved = self._columns(x)
        begins = document_begins(where, self.cp)
        if not self.cp.is_split:
            y, _ = self._recurrence(self._convolved(convolved, [None] * 3, begins), self._steps(dt), begins, None)
            return self._out(y, z)
        width = self.conv_x.weight.shape[1] - 1
        cut = [None, None] if begins is None else list(begins.chunk(2))
        pieces = zip(*(each.chunk(2) for each in convolved), strict=True)
        inputs = [
            self._convolved(list(piece), list(halo), begin)
            for piece, halo, begin in zip(pieces, halos(convolved, width, self.cp, where), cut, strict=True)
        ]
        steps = self._steps(dt).chunk(2)
        rate = self._rate()
        summaries = [
            ssd_summary(xs, step, rate, b, begins=begin)
            for (xs, b, _), step, begin in zip(inputs, steps, cut, strict=True)
        ]
        states = states_before(summaries, self.cp, scale_state)
        ys = [
            self._recurrence(given, step, begin, state)[0]
            for given, step, begin, state in zip(inputs, steps, cut, states, strict=True)
        ]
        return self._out(torch.cat(ys), z)

    def initial_state(self, batch: int, max_len: int | None = None) -> Mamba2State:
        """Return the state before a sample, whose size does not depend on `max_len`."""
        n = self.A_log.shape[0]
        # At least fp32, as the scan returns it.
        state = at_least_fp32(self.A_log[:0]).new_zeros(batch, n, self.head_dim, self.state_size)
        return Mamba2State([conv.empty_halo(batch) for conv in (self.conv_x, self.conv_B, self.conv_C)], state)

    def step(self, x: Float[Tensor, "s b h"], state: Mamba2State) -> Float[Tensor, "s b h"]:
        """Mix the next tokens with all before them, and bring the state up to date."""
        z, dt, *convolved = self._columns(x)
        convs = (self.conv_x, self.conv_B, self.conv_C)
        stepped = [conv.step(each, halo) for conv, each, halo in zip(convs, convolved, state.tails, strict=True)]
        inputs = self._by_head(*(made for made, _ in stepped))
        state.tails = [halo for _, halo in stepped]
        if x.shape[0] == 1:
            xs, b, c = inputs
            y, state.state = ssd_step(xs, self._steps(dt), self._rate(), b, c, self.D, state.state)
        else:
            y, state.state = self._recurrence(inputs, self._steps(dt), None, state.state)
        return self._out(y, z)

    def _columns(self, x: Tensor) -> list[Tensor]:
        return column_products(x, (self.z, self.dt, self.x, self.B, self.C), self.tp, joins_narrow=True)

    def _convolved(
        self, inputs: list[Tensor], before: list[Tensor | None], begins: Bool[Tensor, "s b"] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return x by head, B and C by group."""
        convs = (self.conv_x, self.conv_B, self.conv_C)
        return self._by_head(
            *(conv(each, halo, begins) for conv, each, halo in zip(convs, inputs, before, strict=True))
        )

    def _by_head(self, x: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        by_group = (-1, self.state_size)
        b, c = torch.unflatten(b, 2, by_group), torch.unflatten(c, 2, by_group)
        return torch.unflatten(x, 2, (-1, self.head_dim)), b, c

    def _steps(self, dt: Tensor) -> Tensor:
        low, high = self.time_step.limit
        steps = F.softplus(at_least_fp32(dt) + at_least_fp32(self.dt_bias))
        return steps if (low, high) == (0.0, float("inf")) else steps.clamp(low, high)

    def _rate(self) -> Tensor:
        return -at_least_fp32(self.A_log).exp()

    def _recurrence(
        self, inputs: tuple[Tensor, Tensor, Tensor], dt: Tensor, begins: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, b, c = inputs
        rate, length = self._rate(), self.chunk_size
        return ssd(x, dt, rate, b, c, self.D, begins=begins, initial_state=state, chunk_size=length)

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        return self.output(self.norm(y.flatten(2), z))  # type: ignore[no-any-return]


def make(config: ModelConfig, making: Making) -> Mamba2:
    """Return Mamba-2 as the config has it."""
    table, mesh = config.mamba2, making.mesh
    assert table is not None, "the checks see to it that M has its table"
    sizes = (table.num_groups, table.state_size, table.conv_kernel, table.chunk_size)
    group_copies = mesh.neighbours(copies_of(table.num_groups, mesh.tp.size, what="num_groups"))
    return Mamba2(
        config.hidden_size,
        Mamba2Sizes(table.heads(config.hidden_size), table.head_dim, *sizes),
        norm_eps=config.norm_eps,
        bias=table.bias,
        conv_bias=table.conv_bias,
        time_step=TimeStep(table.time_step_low, table.time_step_high),
        init=making.init,
        spread=Spread(mesh.tp, group_copies, mesh.cp),
    )
