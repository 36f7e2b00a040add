"""The gated delta net: its table [model.gated_delta] and its description (module: mixers/gated_delta.py).

    A_log, dt_bias [n]   q, k [m*d, h]   v, z [n*e, h]   beta, a [n, h]   conv_q, conv_k [m*d, l]   conv_v [n*e, l]
    norm [e]   output [h, n*e]          n value heads of width e, m key heads of width d, l = conv_kernel

Kept for each token, of a rank's heads: h/tp of the normed input; 2md + ne of q, k and v before the convolution and ne
of v behind it; 4md + 2nd of q and k behind it: as they came, of length 1, and for each value head, in at least fp32;
ne of y, ne of the normed y, ne of z, ne of what the output takes; a few numbers of n heads in at least fp32; and for
each chunk the state before it. Over cp the rows and states that make a chunk's own state once more, and for each sample
what tells the states before both halves of a rank's tokens, with the tokens before them that the convolutions see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from meshwright.model.kinds.kept import halo_numbers, norm_inputs, normed_input, sequence_states
from meshwright.model.kinds.kind import OVER_TP, Choose, Cut, Degrees, Kind, Named, Need, Types, Weight, matrix, vector
from meshwright.model.kinds.mixers.mamba2 import SMALL_CHUNK, changed, width_above
from meshwright.model.kinds.sizes import TABLE, Size, SizeOrZero
from meshwright.parallel.fits import divisors, nearest

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig
    from meshwright.model.kinds.small import Small


class GatedDeltaConfig(BaseModel):
    """The gated delta net that stands at each `G` of the pattern."""

    model_config = TABLE

    num_heads: SizeOrZero = 0
    """Heads of values; 0 = hidden_size / value_head_dim, rounded up. `parallel.tp` must divide it."""
    num_key_heads: SizeOrZero = 0
    """Heads of keys and queries, shared by neighbouring value heads; 0 = num_heads. Qwen3-Next has half as many."""
    key_head_dim: Size = 128
    """Width of a key; 128 is usual."""
    value_head_dim: Size = 128
    """Width of a value; 128 is usual. A head remembers key_head_dim * value_head_dim numbers."""
    conv_kernel: Size = 4
    """Tokens that the convolutions before the recurrence see, the token itself among them."""
    chunk_size: Size = 64
    """Tokens of a chunk of the recurrence: speed and memory, never the result."""

    def heads(self, hidden_size: int) -> int:
        """Return the number of value heads."""
        return self.num_heads or -(-hidden_size // self.value_head_dim)

    def key_heads(self, hidden_size: int) -> int:
        """Return the number of key heads."""
        return self.num_key_heads or self.heads(hidden_size)


@dataclass(frozen=True, eq=False)
class GatedDeltaKind(Kind):
    """A state for each head that unlearns what it overwrites."""

    def reads_of(self, model: ModelConfig) -> frozenset[str]:
        """Return them, and norm_eps."""
        return self.reads | {"norm_eps"}

    def weights(self, model: ModelConfig) -> Named:
        """Yield what there is one of for each head, the products, the convolutions and the norm."""
        table, h = _table(model), model.hidden_size
        n, key_heads = table.heads(h), table.key_heads(h)
        keys, values = key_heads * table.key_head_dim, n * table.value_head_dim
        of_keys = Cut(("tp",), units=key_heads)
        yield "A_log", vector(n, OVER_TP)
        yield "dt_bias", vector(n, OVER_TP)
        yield "q.weight", matrix(keys, h, of_keys)
        yield "k.weight", matrix(keys, h, of_keys)
        for name, rows in (("v", values), ("z", values), ("beta", n), ("a", n)):
            yield f"{name}.weight", matrix(rows, h, OVER_TP)
        yield "conv_q.weight", Weight((keys, table.conv_kernel), of_keys)
        yield "conv_k.weight", Weight((keys, table.conv_kernel), of_keys)
        yield "conv_v.weight", Weight((values, table.conv_kernel), OVER_TP)
        yield "norm.weight", vector(table.value_head_dim)
        yield "output.weight", matrix(h, values, OVER_TP)

    def mixing_flops(self, model: ModelConfig, seq_len: int, *, causal: bool) -> float:
        """Return those of the recurrence: decay, read the key's, write, read the query's; and of the convolutions."""
        table, h = _table(model), model.hidden_size
        values = table.heads(h) * table.value_head_dim
        channels = values + 2 * table.key_heads(h) * table.key_head_dim
        return 7.0 * values * table.key_head_dim + 2.0 * channels * table.conv_kernel

    def kept(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return what stands at the head of this file."""
        table, h = _table(model), model.hidden_size
        n, key_heads = table.heads(h) / degrees.tp, max(table.key_heads(h) / degrees.tp, 1)
        d, e = table.key_head_dim, table.value_head_dim
        shared = n > key_heads  # q and k are then repeated for each value head
        of_keys = 2 * d * (key_heads * (types.product + types.wide) + (n if shared else key_heads) * types.wide)
        own = n * e * 6 * types.product + of_keys + 6 * n * types.wide
        own += n * d * e / table.chunk_size * types.wide
        if degrees.cp > 1:
            own += n * (e + d) * types.product + n * d * (1 + (d + e) / table.chunk_size) * types.wide
        return norm_inputs(model, self.place, degrees, types) + normed_input(model, 6, degrees, types) + own

    def kept_of_sample(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return what stands at the head of this file."""
        table, h = _table(model), model.hidden_size
        n, key_heads = table.heads(h) / degrees.tp, max(table.key_heads(h) / degrees.tp, 1)
        d, e = table.key_head_dim, table.value_head_dim
        halo = halo_numbers(n * e + 2 * key_heads * d, table.conv_kernel, degrees)
        states = sequence_states(n * d * d, n * d * e, degrees)
        if degrees.cp > 1:
            states -= 2 * n * d * e  # those before both halves are those before their first chunks, counted above
        return states * types.wide + halo * types.product

    def state_bytes(self, model: ModelConfig, tokens: int, width: int) -> float:
        """Return the bytes of the state and of the last tokens, however many there were."""
        table, h = _table(model), model.hidden_size
        values = table.heads(h) * table.value_head_dim
        tail = (table.conv_kernel - 1) * (values + 2 * table.key_heads(h) * table.key_head_dim)
        return values * table.key_head_dim * max(4.0, width) + float(tail * width)

    def problems(self, model: ModelConfig, choose: Choose) -> list[str]:
        """Return what is wrong with the heads."""
        table, h = _table(model), model.hidden_size
        n, key_heads = table.heads(h), table.key_heads(h)
        if n % key_heads == 0:
            return []
        others = {size: changed(model, "gated_delta", num_key_heads=size) for size in divisors(n)}
        fits = nearest(choose("model.gated_delta.num_key_heads", others), key_heads)
        rule = f"must divide the {n} value heads of model.gated_delta"
        return [
            f"model.gated_delta.num_key_heads = {key_heads}: {rule}" + (f"; one of {fits} would fit" if fits else "")
        ]

    def needs(self, model: ModelConfig) -> list[Need]:
        """Return that tp divides the value heads, and divides the key heads or is a multiple of them."""
        table, h = _table(model), model.hidden_size
        n, key_heads = table.heads(h), table.key_heads(h)
        name = (
            "model.gated_delta.num_heads"
            if table.num_heads
            else "model.hidden_size / model.gated_delta.value_head_dim, rounded up"
        )
        found = [Need("tp", name, n)]
        if table.num_key_heads and n % key_heads == 0:
            found.append(Need("tp", "model.gated_delta.num_key_heads", key_heads, or_multiple=True))
        return found

    def narrowed(self, model: ModelConfig, small: Small, above: int) -> dict[str, Any]:
        """Return few heads of widths of their own, and chunks that are shorter than the small sequence."""
        table, h = _table(model), model.hidden_size
        heads, key_heads = small.heads(table.heads(h), table.key_heads(h))
        sizes = {
            "num_heads": heads,
            "num_key_heads": key_heads,
            "key_head_dim": min(table.key_head_dim, 8 + table.key_head_dim % 8),
            "value_head_dim": width_above(heads, above, table.value_head_dim),
            "chunk_size": min(table.chunk_size, SMALL_CHUNK),
        }
        return {"gated_delta": table.model_copy(update=sizes)}


def _table(model: ModelConfig) -> GatedDeltaConfig:
    assert model.gated_delta is not None, "the checks see to it that G has its table"
    return model.gated_delta
