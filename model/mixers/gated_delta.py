"""The gated delta net (Yang et al. 2024; as in Qwen3-Next): a state for each head that unlearns what it overwrites.

    x --gather--> q, k, v, z, beta, a              n value heads, k key heads that neighbours among them share
    q, k, v = silu(conv(q)), silu(conv(k)), silu(conv(v))             the last tokens, channel by channel
    beta = sigmoid(beta);   g = -exp(A_log) softplus(a + dt_bias)     how much is written, how much remains
    h[t] = exp(g) (I - beta k k^T) h[t-1] + beta k v^T;   y = q^T h   q and k of length 1, q over sqrt(d)
    output(norm(y) silu(z))                                           the norm is each head's own

Under tp a rank has n/tp value heads and the key heads that these use; where tp exceeds the key heads, the neighbouring
ranks that use one hold copies. Under cp a rank has two chunks of each sample: two halos for the convolutions, and the
states that the chunks before leave, which each turns by a matrix (parallel/sequence_state.py).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.activations import gated_unit
from meshwright.kernels.precision import at_least_fp32
from meshwright.kernels.states.conv import tail
from meshwright.kernels.states.gated_delta import gated_delta, gated_delta_summary
from meshwright.model.config import ModelConfig
from meshwright.model.making import Making
from meshwright.model.mixers.channel_conv import ChannelConv
from meshwright.model.norms import RMSNorm
from meshwright.parallel.fits import check_sizes
from meshwright.parallel.initialise import ONES, InitPolicy, InitRule
from meshwright.parallel.mesh import NO_CP, NO_TP, Axis
from meshwright.parallel.placement import Placement, Split
from meshwright.parallel.sequence_state import document_begins, halos, states_before, turn_state
from meshwright.parallel.tally import Tally
from meshwright.parallel.tensor.linear import NO_COPIES, ColumnLinear, RowLinear, column_products, copies_of, divide
from meshwright.parallel.where import Where

LENGTH_EPS = 1e-6
"""Added to the square of a key's length, as in flash-linear-attention."""


class DeltaSizes(NamedTuple):
    """How wide the mixer is inside."""

    num_heads: int
    """Of values."""
    num_key_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int = 4
    chunk_size: int = 64


class DeltaSpread(NamedTuple):
    """The axes over which heads and samples are spread."""

    tp: Axis = NO_TP
    key_copies: Axis = NO_COPIES
    """The neighbouring ranks of tp that use the same key head."""
    cp: Axis = NO_CP


ONE_RANK = DeltaSpread()


@dataclass
class DeltaState:
    """What generation carries from token to token."""

    tails: list[Float[Tensor, "k_less_one b _"]]
    """Of q, k and v, before their convolutions."""
    state: Float[Tensor, "b n d e"]


class GatedDelta(nn.Module):
    """A causal mixer of constant state."""

    def __init__(
        self,
        hidden_size: int,
        sizes: DeltaSizes,
        *,
        norm_eps: float = 1e-6,
        init: InitPolicy | None = None,
        spread: DeltaSpread = ONE_RANK,
    ) -> None:
        """Take global sizes.

        Raises:
            ValueError: if the key heads do not divide the value heads, or tp does not divide either.
        """
        super().__init__()
        check_sizes({"hidden_size": hidden_size, **sizes._asdict()})
        n, key_heads, self.d, self.e, kernel, self.chunk_size = sizes
        divide(n, key_heads, what="num_heads", by="num_key_heads")
        tp, copies, self.cp = spread
        local = divide(n, tp.size, what="num_heads", by=tp.name)
        divide(key_heads * copies.size, tp.size, what="num_key_heads * copies", by=tp.name)
        self.tp, init = tp, init or InitPolicy()
        keys, values = key_heads * self.d, n * self.e
        key_rule, value_rule = init.matrix(hidden_size, keys), init.matrix(hidden_size, values)
        head_rule = init.matrix(hidden_size, n)
        self.q = ColumnLinear(hidden_size, keys, rule=key_rule, tp=tp, copies=copies)
        self.k = ColumnLinear(hidden_size, keys, rule=key_rule, tp=tp, copies=copies)
        self.v = ColumnLinear(hidden_size, values, rule=init.matrix(hidden_size, values, is_value=True), tp=tp)
        self.z = ColumnLinear(hidden_size, values, rule=value_rule, tp=tp)
        self.beta = ColumnLinear(hidden_size, n, rule=head_rule, tp=tp)
        self.a = ColumnLinear(hidden_size, n, rule=head_rule, tp=tp)
        self.conv_q = ChannelConv(keys, kernel, bias=False, tp=tp, copies=copies)
        self.conv_k = ChannelConv(keys, kernel, bias=False, tp=tp, copies=copies)
        self.conv_v = ChannelConv(values, kernel, bias=False, tp=tp)
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(local)) for _ in range(2))
        self.norm = RMSNorm(self.e, norm_eps, tp=tp)
        self.output = RowLinear(values, hidden_size, rule=init.matrix(values, hidden_size, to_residual=True), tp=tp)

    def placements(self) -> dict[str, Placement]:
        """Say that what there is one of for each head is cut by head."""
        return dict.fromkeys(("A_log", "dt_bias"), Placement((Split(0, self.tp),)))

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins: A from 0 to 16, as in Qwen3-Next, but no logarithm of 0."""
        return {"A_log": InitRule("log_of_uniform", low=0.01, high=16.0), "dt_bias": ONES}

    def forward(
        self, x: Float[Tensor, "s_local b h"], where: Where, tally: Tally | None
    ) -> Float[Tensor, "s_local b h"]:
        """Mix each token with those before it in its sample (in its document, where `where` says so)."""
        z, beta, a, *convolved = self._columns(x)
        beta, g = self._gates(beta, a)
        begins = document_begins(where, self.cp)
        if not self.cp.is_split:
            given = (*self._convolved(convolved, [None] * 3, begins), beta, g)
            return self._out(self._recurrence(given, begins, None)[0], z)
        width = self.conv_q.weight.shape[1] - 1
        cut = [None, None] if begins is None else list(begins.chunk(2))
        pieces = zip(*(each.chunk(2) for each in convolved), strict=True)
        before = halos(convolved, width, self.cp, where)
        heads = [
            self._convolved(list(piece), list(halo), begin)
            for piece, halo, begin in zip(pieces, before, cut, strict=True)
        ]
        chunks = [(*qkv, b_, g_) for qkv, b_, g_ in zip(heads, beta.chunk(2), g.chunk(2), strict=True)]
        summaries = [
            gated_delta_summary(*given[1:], begins=begin, chunk_size=self.chunk_size)
            for given, begin in zip(chunks, cut, strict=True)
        ]
        states = states_before(summaries, self.cp, turn_state)
        ys = [self._recurrence(*given)[0] for given in zip(chunks, cut, states, strict=True)]
        return self._out(torch.cat(ys), z)

    def initial_state(self, batch: int, max_len: int | None = None) -> DeltaState:
        """Return the state before a sample, whose size does not depend on `max_len`."""
        state = at_least_fp32(self.A_log[:0]).new_zeros(batch, self.A_log.shape[0], self.d, self.e)
        return DeltaState([conv.empty_halo(batch) for conv in (self.conv_q, self.conv_k, self.conv_v)], state)

    def step(self, x: Float[Tensor, "s b h"], state: DeltaState) -> Float[Tensor, "s b h"]:
        """Mix the next tokens with all before them, and bring the state up to date."""
        z, beta, a, *convolved = self._columns(x)
        given = (*self._convolved(convolved, list(state.tails), None), *self._gates(beta, a))
        state.tails = [tail(each, halo) for each, halo in zip(convolved, state.tails, strict=True)]
        y, state.state = self._recurrence(given, None, state.state)
        return self._out(y, z)

    def _columns(self, x: Tensor) -> list[Tensor]:
        return column_products(x, (self.z, self.beta, self.a, self.q, self.k, self.v), self.tp)

    def _gates(self, beta: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much each token writes, and the logarithm of what remains of the state."""
        steps = F.softplus(at_least_fp32(a) + at_least_fp32(self.dt_bias))
        return at_least_fp32(beta).sigmoid(), -at_least_fp32(self.A_log).exp() * steps

    def _convolved(
        self, inputs: list[Tensor], before: list[Tensor | None], begins: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v by value head; q and k as they meet, in at least fp32."""
        convs = (self.conv_q, self.conv_k, self.conv_v)
        q, k, v = (conv(each, halo, begins) for conv, each, halo in zip(convs, inputs, before, strict=True))
        q, k = (_of_length_1(torch.unflatten(each, 2, (-1, self.d))) for each in (q, k))
        v = torch.unflatten(v, 2, (-1, self.e))
        shared = v.shape[2] // q.shape[2]
        q, k = (each.repeat_interleave(shared, 2) if shared > 1 else each for each in (q * self.d**-0.5, k))
        return q, k, v

    def _recurrence(
        self, inputs: tuple[Tensor, ...], begins: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v, beta, g = inputs
        return gated_delta(q, k, v, beta, g, begins=begins, initial_state=state, chunk_size=self.chunk_size)

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        return self.output(gated_unit(z, self.norm(y).flatten(2)))  # type: ignore[no-any-return]


def _of_length_1(x: Tensor) -> Tensor:
    wide = at_least_fp32(x)
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + LENGTH_EPS)


def make(config: ModelConfig, making: Making) -> GatedDelta:
    """Return the gated delta net as the config has it."""
    table, mesh, h = config.gated_delta, making.mesh, config.hidden_size
    assert table is not None, "the checks see to it that G has its table"
    widths = (table.key_head_dim, table.value_head_dim, table.conv_kernel, table.chunk_size)
    key_copies = mesh.neighbours(copies_of(table.key_heads(h), mesh.tp.size, what="num_key_heads"))
    spread = DeltaSpread(mesh.tp, key_copies, mesh.cp)
    sizes = DeltaSizes(table.heads(h), table.key_heads(h), *widths)
    return GatedDelta(h, sizes, norm_eps=config.norm_eps, init=making.init, spread=spread)
