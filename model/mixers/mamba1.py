"""Mamba-1 (Gu and Dao 2023): a state for each channel, whose entries decay each by itself.

    x --gather--> z, x                             [s, b, c]: c channels
    x = silu(conv(x))                              the last k tokens, channel by channel
    dt, B, C = dt_down x, B x, C x                 [s, b, R], [s, b, N], [s, b, N]: the same for all channels
    dt = softplus(dt_up dt + dt_bias)              [s, b, c]
    h[t] = exp(-exp(A_log) dt) h[t-1] + dt x B;    y = h C + D x
    output(y silu(z))

Under tp a rank has c/tp channels. dt, B and C are made of all channels: products of a rank's own, summed over the
ranks, given to all of them. Under cp a rank has two chunks of each sample: two halos for the convolution, and the
states that the chunks before leave (parallel/sequence_state.py). In generation the state is of constant size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.activations import gated_unit
from meshwright.kernels.matmul.linear import linear
from meshwright.kernels.precision import at_least_fp32
from meshwright.kernels.states.selective_scan import selective_scan, selective_summary
from meshwright.model.config import ModelConfig
from meshwright.model.making import Making
from meshwright.model.mixers.channel_conv import ChannelConv
from meshwright.parallel.collectives import gather, scatter_sum
from meshwright.parallel.fits import check_sizes
from meshwright.parallel.initialise import ONES, InitPolicy, InitRule
from meshwright.parallel.mesh import NO_CP, NO_TP, Axis
from meshwright.parallel.placement import Placement, Split
from meshwright.parallel.sequence_state import document_begins, halos, scale_entries, states_before
from meshwright.parallel.tally import Tally
from meshwright.parallel.tensor.linear import ColumnLinear, RowLinear, column_products, divide
from meshwright.parallel.where import Where


class Mamba1Sizes(NamedTuple):
    """How wide the mixer is inside."""

    inner_size: int
    """Channels: usually twice hidden_size."""
    dt_rank: int
    """Rank of the time step's weight: usually hidden_size / 16."""
    state_size: int = 16
    conv_kernel: int = 4
    chunk_size: int = 16


@dataclass
class Mamba1State:
    """What generation carries from token to token."""

    tail: Float[Tensor, "k_less_one b c"]
    """Of x, before its convolution."""
    state: Float[Tensor, "b c N"]


class Mamba1(nn.Module):
    """A causal mixer of constant state."""

    def __init__(
        self,
        hidden_size: int,
        sizes: Mamba1Sizes,
        *,
        bias: bool = False,
        conv_bias: bool = True,
        init: InitPolicy | None = None,
        tp: Axis = NO_TP,
        cp: Axis = NO_CP,
    ) -> None:
        """Take global sizes; `bias` gives z, x and output one, `conv_bias` the convolution.

        Raises:
            ValueError: if tp does not divide the channels.
        """
        super().__init__()
        check_sizes({"hidden_size": hidden_size, **sizes._asdict()})
        channels, self.dt_rank, self.state_size, kernel, self.chunk_size = sizes
        local = divide(channels, tp.size, what="inner_size", by=tp.name)
        self.tp, self.cp, init = tp, cp, init or InitPolicy()
        inward, step = init.matrix(hidden_size, channels), self.dt_rank**-0.5
        self.z = ColumnLinear(hidden_size, channels, rule=inward, bias=bias, tp=tp)
        values = init.matrix(hidden_size, channels, is_value=True)
        self.x = ColumnLinear(hidden_size, channels, rule=values, bias=bias, tp=tp)
        self.conv_x = ChannelConv(channels, kernel, bias=conv_bias, tp=tp)
        self.dt_down = RowLinear(channels, self.dt_rank, rule=init.matrix(channels, self.dt_rank), tp=tp)
        self.B = RowLinear(channels, self.state_size, rule=init.matrix(channels, self.state_size), tp=tp)
        self.C = RowLinear(channels, self.state_size, rule=init.matrix(channels, self.state_size), tp=tp)
        self.dt_up = ColumnLinear(self.dt_rank, channels, rule=InitRule("uniform", step), tp=tp)
        self.A_log = nn.Parameter(torch.empty(local, self.state_size))
        self.D, self.dt_bias = (nn.Parameter(torch.empty(local)) for _ in range(2))
        outward = init.matrix(channels, hidden_size, to_residual=True)
        self.output = RowLinear(channels, hidden_size, rule=outward, bias=bias, tp=tp)

    def placements(self) -> dict[str, Placement]:
        """Say that what there is one of for each channel is cut by channel."""
        return dict.fromkeys(("A_log", "D", "dt_bias"), Placement((Split(0, self.tp),)))

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins: A = -1, -2, ... -N in each channel, steps from 0.001 to 0.1."""
        steps = InitRule("softplus_inverse", low=0.001, high=0.1)
        return {"A_log": InitRule("log_of_column"), "D": ONES, "dt_bias": steps}

    def forward(
        self, x: Float[Tensor, "s_local b h"], where: Where, tally: Tally | None
    ) -> Float[Tensor, "s_local b h"]:
        """Mix each token with those before it in its sample (in its document, where `where` says so)."""
        z, x = column_products(x, (self.z, self.x), self.tp)
        begins = document_begins(where, self.cp)
        if not self.cp.is_split:
            y, _ = self._recurrence(self._inputs(self.conv_x(x, None, begins)), begins, None)
            return self._out(y, z)
        cut = [None, None] if begins is None else list(begins.chunk(2))
        before = halos([x], self.conv_x.weight.shape[1] - 1, self.cp, where)
        pieces = zip(x.chunk(2), before, cut, strict=True)
        whole = self._inputs(torch.cat([self.conv_x(piece, halo, begin) for piece, (halo,), begin in pieces]))
        chunks = list(zip(*(each.chunk(2) for each in whole), strict=True))
        summaries = [
            selective_summary(u, dt, self._rate(), b, begins=begin, chunk_size=self.chunk_size)
            for (u, dt, b, _), begin in zip(chunks, cut, strict=True)
        ]
        states = states_before(summaries, self.cp, scale_entries)
        ys = [self._recurrence(*given)[0] for given in zip(chunks, cut, states, strict=True)]
        return self._out(torch.cat(ys), z)

    def initial_state(self, batch: int, max_len: int | None = None) -> Mamba1State:
        """Return the state before a sample, whose size does not depend on `max_len`."""
        state = at_least_fp32(self.A_log[:0]).new_zeros(batch, *self.A_log.shape)
        return Mamba1State(self.conv_x.empty_halo(batch), state)

    def step(self, x: Float[Tensor, "s b h"], state: Mamba1State) -> Float[Tensor, "s b h"]:
        """Mix the next tokens with all before them, and bring the state up to date."""
        z, x = column_products(x, (self.z, self.x), self.tp)
        x, state.tail = self.conv_x.step(x, state.tail)
        y, last = self._recurrence(self._inputs(x), None, state.state)
        state.state = last.clone()  # else it would hold those before each chunk, which it is one of
        return self._out(y, z)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x, dt, B and C of convolved x."""
        weight = torch.cat([self.dt_down.weight, self.B.weight, self.C.weight])
        # A rank uses what all ranks' channels make with its own channels: summed both ways.
        made = gather(scatter_sum(linear(x, weight), self.tp), self.tp)
        low, b, c = torch.split(made, [self.dt_rank, self.state_size, self.state_size], -1)
        dt = F.softplus(at_least_fp32(self.dt_up(low)) + at_least_fp32(self.dt_bias))
        return x, dt, b, c

    def _rate(self) -> Tensor:
        return -at_least_fp32(self.A_log).exp()

    def _recurrence(
        self, inputs: tuple[Tensor, ...], begins: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, dt, b, c = inputs
        rate, length = self._rate(), self.chunk_size
        return selective_scan(x, dt, rate, b, c, self.D, begins=begins, initial_state=state, chunk_size=length)

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        return self.output(gated_unit(z, y))  # type: ignore[no-any-return]


def make(config: ModelConfig, making: Making) -> Mamba1:
    """Return Mamba-1 as the config has it."""
    table, mesh, h = config.mamba1, making.mesh, config.hidden_size
    assert table is not None, "the checks see to it that m has its table"
    sizes = Mamba1Sizes(table.channels(h), table.rank(h), table.state_size, table.conv_kernel, table.chunk_size)
    options = {"bias": table.bias, "conv_bias": table.conv_bias}
    return Mamba1(h, sizes, **options, init=making.init, tp=mesh.tp, cp=mesh.cp)
