"""Mamba-1: its table [model.mamba1] and its description (module: mixers/mamba1.py).

    A_log [c, N]   D, dt_bias [c]   z, x [c, h]   conv_x [c, k]   dt_down [R, c]   B, C [N, c]   dt_up [c, R]
    output [h, c]
    c = inner_size channels, N = state_size, R = dt_rank, k = conv_kernel

Kept for each token, of a rank's c/tp channels: h/tp of the normed input; c of z, 2c of x before and behind the
convolution, c of y, c of what the output takes; R + 2N of dt, B and C, of all channels; 2c of dt before and behind
softplus in at least fp32; and for each chunk of l tokens the state before it, c*N/l. Over cp twice the states, and N.

Kept for each sample: a state, c*N, behind the last chunk, over cp two of each of both halves of a rank's tokens, with a
decay; and what tells the states before these, with the tokens before them that the convolution sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from meshwright.model.kinds.kept import halo_numbers, norm_inputs, normed_input, sequence_states
from meshwright.model.kinds.kind import OVER_TP, Degrees, Kind, Named, Need, Types, Weight, matrix, vector
from meshwright.model.kinds.sizes import TABLE, Size, SizeOrZero

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig
    from meshwright.model.kinds.small import Small

EXPAND, DT_SHARE = 2, 16
SMALL_CHUNK = 8


class Mamba1Config(BaseModel):
    """The Mamba-1 mixer that stands at each `m` of the pattern."""

    model_config = TABLE

    inner_size: SizeOrZero = 0
    """Channels, each with decays of its own; 0 = 2 * hidden_size. `parallel.tp` must divide it."""
    dt_rank: SizeOrZero = 0
    """Rank of the weight that makes the time steps; 0 = hidden_size / 16, rounded up."""
    state_size: Size = 16
    """Numbers that each channel remembers; 16 is usual, more costs time in proportion."""
    conv_kernel: Size = 4
    """Tokens that the convolution before the scan sees, the token itself among them."""
    chunk_size: Size = 16
    """Tokens of a chunk of the scan: memory and speed, never the result."""
    bias: bool = False
    """Give the products of the mixer a bias."""
    conv_bias: bool = True
    """Give the convolution a bias."""

    def channels(self, hidden_size: int) -> int:
        """Return the number of channels."""
        return self.inner_size or EXPAND * hidden_size

    def rank(self, hidden_size: int) -> int:
        """Return the rank of the time step's weight."""
        return self.dt_rank or -(-hidden_size // DT_SHARE)


@dataclass(frozen=True, eq=False)
class Mamba1Kind(Kind):
    """A state for each channel, whose entries decay each by itself."""

    def weights(self, model: ModelConfig) -> Named:
        """Yield what there is one of for each channel, then the products and the convolution."""
        table, h = _table(model), model.hidden_size
        c, rank, size = table.channels(h), table.rank(h), table.state_size
        yield "A_log", Weight((c, size), OVER_TP)
        yield "D", vector(c, OVER_TP)
        yield "dt_bias", vector(c, OVER_TP)
        for name in ("z", "x"):
            yield f"{name}.weight", matrix(c, h, OVER_TP)
            if table.bias:
                yield f"{name}.bias", vector(c, OVER_TP)
        yield "conv_x.weight", Weight((c, table.conv_kernel), OVER_TP)
        if table.conv_bias:
            yield "conv_x.bias", vector(c, OVER_TP)
        for name, rows in (("dt_down", rank), ("B", size), ("C", size)):
            yield f"{name}.weight", matrix(rows, c, OVER_TP)
        yield "dt_up.weight", matrix(c, rank, OVER_TP)
        yield "output.weight", matrix(h, c, OVER_TP)
        if table.bias:
            yield "output.bias", vector(h)

    def mixing_flops(self, model: ModelConfig, seq_len: int, *, causal: bool) -> float:
        """Return those of the recurrence, dt A among them, without exponentials; and of the convolution."""
        table = _table(model)
        return table.channels(model.hidden_size) * (6.0 * table.state_size + 2.0 * table.conv_kernel)

    def kept(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return what stands at the head of this file."""
        table, h = _table(model), model.hidden_size
        c, shared = table.channels(h) / degrees.tp, table.rank(h) + (3 if degrees.cp > 1 else 2) * table.state_size
        states = c * table.state_size / table.chunk_size * types.wide * (2 if degrees.cp > 1 else 1)
        own = (5 * c + shared) * types.product + 2 * c * types.wide + states
        return norm_inputs(model, self.place, degrees, types) + normed_input(model, 2, degrees, types) + own

    def kept_of_sample(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return what stands at the head of this file."""
        table = _table(model)
        c = table.channels(model.hidden_size) / degrees.tp
        state, halo = c * table.state_size, halo_numbers(c, table.conv_kernel, degrees)
        if degrees.cp == 1:
            return state * types.wide
        states = (4 + 2) * state + sequence_states(state, state, degrees)
        return states * types.wide + halo * types.product

    def state_bytes(self, model: ModelConfig, tokens: int, width: int) -> float:
        """Return the bytes of the state and of the last tokens, however many there were."""
        table = _table(model)
        c = table.channels(model.hidden_size)
        return c * table.state_size * max(4.0, width) + float((table.conv_kernel - 1) * c * width)

    def needs(self, model: ModelConfig) -> list[Need]:
        """Return that tp divides the channels."""
        table = _table(model)
        name = "model.mamba1.inner_size" if table.inner_size else "2 * model.hidden_size"
        return [Need("tp", name, table.channels(model.hidden_size))]

    def narrowed(self, model: ModelConfig, small: Small, above: int) -> dict[str, Any]:
        """Return few channels, and chunks that are shorter than the small sequence."""
        table = _table(model)
        channels = table.channels(model.hidden_size)
        sizes = {
            # Wider than the channels of a Mamba-2 beside it.
            "inner_size": small.inner(channels, small.target.tp, small.needs.tp, above=2 * above),
            "dt_rank": min(table.rank(model.hidden_size), 3),
            "state_size": min(table.state_size, 5),
            "chunk_size": min(table.chunk_size, SMALL_CHUNK),
        }
        return {"mamba1": table.model_copy(update=sizes)}


def _table(model: ModelConfig) -> Mamba1Config:
    assert model.mamba1 is not None, "the checks see to it that m has its table"
    return model.mamba1
