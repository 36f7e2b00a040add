"""Mamba-2: its table [model.mamba2] and its description (module: mixers/mamba2.py).

    A_log, D, dt_bias [n]   z, x [c, h]   B, C [g*N, h]   dt [n, h]   conv_x [c, k]   conv_B, conv_C [g*N, k]
    norm [c]   output [h, c]       c = n*d channels of n heads in g groups, N = state_size, k = conv_kernel

Kept for each token, of a rank's heads and groups: h/tp of the normed input; c of z, 2c and 4gN of x, B and C before
and behind the convolution, c of y, c of what the output takes; n of dt before and behind softplus in at least fp32;
and for each chunk of l tokens the state before it, c*N/l. Over cp the rows that make a chunk's state once more, c in
at least fp32, weighted, and where products are narrow also as they were, with gN of B, and 2n of their weights.

Kept for each sample: a state, c*N, behind the last chunk, over cp of each of both halves of a rank's tokens; and what
tells the states before these, with the tokens before them that the convolutions see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, PositiveFloat

from meshwright.kernels.limits import NARROW
from meshwright.model.kinds.kept import halo_numbers, norm_inputs, normed_input, sequence_states
from meshwright.model.kinds.kind import OVER_TP, Choose, Cut, Degrees, Kind, Named, Need, Types, Weight, matrix, vector
from meshwright.model.kinds.sizes import TABLE, Size, SizeOrZero
from meshwright.model.kinds.small import ALIGNED
from meshwright.parallel.fits import divisors, nearest

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig
    from meshwright.model.kinds.small import Small

EXPAND = 2
"""Channels for each feature of the stream, where the number of heads is left out."""
SMALL_CHUNK, SMALL_STATE = 8, 16


class Mamba2Config(BaseModel):
    """The Mamba-2 mixer that stands at each `M` of the pattern."""

    model_config = TABLE

    num_heads: SizeOrZero = 0
    """Heads, each with a decay of its own; 0 = 2 * hidden_size / head_dim. `parallel.tp` must divide it."""
    head_dim: Size = 64
    """Channels of a head; 64 is usual."""
    num_groups: Size = 1
    """Groups of heads that share B and C, as key heads are shared; 1 exports to every inference engine."""
    state_size: Size = 128
    """Numbers that each channel remembers; 64 to 256."""
    conv_kernel: Size = 4
    """Tokens that the convolution before the scan sees, the token itself among them."""
    chunk_size: Size = 64
    """Tokens of a chunk of the scan: speed and memory, never the result; 64 on a CPU, 128 to 256 on a GPU."""
    bias: bool = False
    """Give the products of the mixer a bias."""
    conv_bias: bool = True
    """Give the convolutions a bias, as inference engines take for granted."""
    time_step_low: PositiveFloat = 0.001
    """The smallest time step that a head begins with; the decay of a token is exp(-dt A), A from 1 to 16."""
    time_step_high: PositiveFloat = 0.1
    """The largest time step that a head begins with; heads lie between the two, evenly in the logarithm."""

    def heads(self, hidden_size: int) -> int:
        """Return the number of heads."""
        return self.num_heads or EXPAND * hidden_size // self.head_dim


@dataclass(frozen=True, eq=False)
class Mamba2Kind(Kind):
    """A state for each head, decaying by an input-dependent step."""

    def reads_of(self, model: ModelConfig) -> frozenset[str]:
        """Return them, and norm_eps."""
        return self.reads | {"norm_eps"}

    def weights(self, model: ModelConfig) -> Named:
        """Yield what there is one of for each head, the products, the convolutions and the norm."""
        table, h = _table(model), model.hidden_size
        n, shared = table.heads(h), table.num_groups * table.state_size
        c, of_groups = n * table.head_dim, Cut(("tp",), units=table.num_groups)
        for name in ("A_log", "D", "dt_bias"):
            yield name, vector(n, OVER_TP)
        columns = {"z": (c, OVER_TP), "x": (c, OVER_TP), "B": (shared, of_groups), "C": (shared, of_groups)}
        for name, (rows, cut) in (columns | {"dt": (n, OVER_TP)}).items():
            yield f"{name}.weight", matrix(rows, h, cut)
            if table.bias:
                yield f"{name}.bias", vector(rows, cut)
        for name in ("x", "B", "C"):
            rows, cut = columns[name]
            yield f"conv_{name}.weight", Weight((rows, table.conv_kernel), cut)
            if table.conv_bias:
                yield f"conv_{name}.bias", vector(rows, cut)
        yield "norm.weight", vector(c, OVER_TP)
        yield "output.weight", matrix(h, c, OVER_TP)
        if table.bias:
            yield "output.bias", vector(h)

    def mixing_flops(self, model: ModelConfig, seq_len: int, *, causal: bool) -> float:
        """Return those of the recurrence: decay, write and read each number of the state; and of the convolutions."""
        table = _table(model)
        c = table.heads(model.hidden_size) * table.head_dim
        channels = c + 2 * table.num_groups * table.state_size
        return 5.0 * c * table.state_size + 2.0 * channels * table.conv_kernel

    def kept(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return what stands at the head of this file."""
        table = _table(model)
        n = table.heads(model.hidden_size) / degrees.tp
        c, shared = n * table.head_dim, max(table.num_groups / degrees.tp, 1) * table.state_size
        own = (5 * c + 4 * shared) * types.product + 2 * n * types.wide
        own += c * table.state_size / table.chunk_size * types.wide
        if degrees.cp > 1:
            own += (c + 2 * n) * types.wide + ((c + shared) * types.wide if types.product < types.wide else 0)
        widths = [c, c, shared, shared, n]  # of z, x, B, C, dt, of which the narrow ones are one product
        narrow = 0 if table.bias else sum(width <= NARROW for width in widths)
        products = 5 - max(0, narrow - 1)
        return norm_inputs(model, self.place, degrees, types) + normed_input(model, products, degrees, types) + own

    def kept_of_sample(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return what stands at the head of this file."""
        table = _table(model)
        n = table.heads(model.hidden_size) / degrees.tp
        c, shared = n * table.head_dim, max(table.num_groups / degrees.tp, 1) * table.state_size
        state, halo = c * table.state_size, halo_numbers(c + 2 * shared, table.conv_kernel, degrees)
        if degrees.cp == 1:
            return state * types.wide
        states = 2 * (n + state) + sequence_states(n, state, degrees)
        return states * types.wide + halo * types.product

    def state_bytes(self, model: ModelConfig, tokens: int, width: int) -> float:
        """Return the bytes of the state and of the last tokens, however many there were."""
        table = _table(model)
        c = table.heads(model.hidden_size) * table.head_dim
        tail = (table.conv_kernel - 1) * (c + 2 * table.num_groups * table.state_size)
        return c * table.state_size * max(4.0, width) + float(tail * width)

    def problems(self, model: ModelConfig, choose: Choose) -> list[str]:
        """Return what is wrong with the heads and the groups."""
        table = _table(model)
        found = self._head_problems(model, choose)
        if table.time_step_low >= table.time_step_high:
            found.append(
                f"model.mamba2.time_step_low = {table.time_step_low}: must be below model.mamba2.time_step_high ="
                f" {table.time_step_high}; {table.time_step_high / 100:g} would fit"
            )
        return found

    def _head_problems(self, model: ModelConfig, choose: Choose) -> list[str]:
        table, channels = _table(model), EXPAND * model.hidden_size
        dim, groups, found = table.head_dim, table.num_groups, list[str]()
        others: dict[int, ModelConfig]
        if not table.num_heads and channels % dim != 0:
            of_groups = [size for size in divisors(channels) if channels // size % groups == 0]
            others = {size: changed(model, "mamba2", head_dim=size) for size in of_groups or divisors(channels)}
            fits = nearest(choose("model.mamba2.head_dim", others), dim)
            found.append(
                f"model.mamba2.head_dim = {dim}: must divide 2 * model.hidden_size = {channels}, or"
                f" model.mamba2.num_heads be given; one of {fits} would fit"
            )
            if not of_groups:
                found.append(
                    f"model.mamba2.num_groups = {groups}: must divide the heads of model.mamba2, 2 * model.hidden_size"
                    f" = {channels} over model.mamba2.head_dim; 1 would fit"
                )
            return found
        n = table.heads(model.hidden_size)
        if n % groups != 0:
            others = {size: changed(model, "mamba2", num_groups=size) for size in divisors(n)}
            fits = nearest(choose("model.mamba2.num_groups", others), groups)
            rule = f"must divide the {n} heads of model.mamba2; one of {fits} would fit"
            found.append(f"model.mamba2.num_groups = {groups}: {rule}")
        return found

    def needs(self, model: ModelConfig) -> list[Need]:
        """Return that tp divides the heads, and divides the groups or is a multiple of them."""
        table, h = _table(model), model.hidden_size
        name = "model.mamba2.num_heads" if table.num_heads else "2 * model.hidden_size / model.mamba2.head_dim"
        n = table.heads(h)
        if not n or n % table.num_groups != 0:
            return []  # told as a problem
        return [Need("tp", name, n), Need("tp", "model.mamba2.num_groups", table.num_groups, or_multiple=True)]

    def narrowed(self, model: ModelConfig, small: Small, above: int) -> dict[str, Any]:
        """Return few heads of a width of their own, and chunks that are shorter than the small sequence."""
        table = _table(model)
        heads, groups = small.heads(table.heads(model.hidden_size), table.num_groups)
        sizes = {
            "num_heads": heads,
            "num_groups": groups,
            "head_dim": width_above(heads, above, table.head_dim),
            "state_size": min(table.state_size, SMALL_STATE + table.state_size % ALIGNED),
            "chunk_size": min(table.chunk_size, SMALL_CHUNK),
        }
        return {"mamba2": table.model_copy(update=sizes)}


def width_above(heads: int, above: int, head_dim: int) -> int:
    """Return a width of a head, aligned as `head_dim` is, with which all heads together are wider than `above`."""
    return ALIGNED * (above // heads // ALIGNED + 1) + head_dim % ALIGNED


def changed(model: ModelConfig, table: str, **keys: int) -> ModelConfig:
    """Return the config with other keys in one of its tables."""
    return model.model_copy(update={table: getattr(model, table).model_copy(update=keys)})


def _table(model: ModelConfig) -> Mamba2Config:
    assert model.mamba2 is not None, "the checks see to it that M has its table"
    return model.mamba2
