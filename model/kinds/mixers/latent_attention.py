"""Multi-head latent attention as a description: its weights, operations and bytes (module: mixers/latent_attention.py).

    q_a [a, h], q_a_norm [a], q_b [n*(p+r), a]  or  q [n*(p+r), h]      kv_a [c, h]   k_rope [r, h]   kv_a_norm [c]
    k_b [n*p, c]   v_b [n*e, c]   output [h, n*e]                       whole but for those of heads

One switch adds the biases of q_a, kv_a, k_rope and output, as DeepSeek's attention_bias does: all of "q", "k", "v" and
"output" in model.bias, or none.

Kept for each token that a mixer of this rank sees: h/tp of the norm's input and of the normed one; of each latent
what its norm takes and gives, 2(a + c)/tp; n(p + r)/tp of queries and of keys, ne/tp of values and of the output, n/tp
log-sum-exps in at least fp32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from meshwright.model.kinds.kept import norm_inputs, normed_input
from meshwright.model.kinds.kind import OVER_TP, Choose, Degrees, Kind, Named, Need, Types, matrix, vector
from meshwright.model.kinds.mixers.attention import scaling_problems
from meshwright.model.kinds.mixers.attention_keys import LatentConfig

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig
    from meshwright.model.kinds.small import Small


ATTENTION_BIAS = ("q", "k", "v", "output")


@dataclass(frozen=True, eq=False)
class LatentKind(Kind):
    """Attention whose keys and values come from a latent."""

    reads: ClassVar[frozenset[str]] = frozenset(
        {
            "num_heads", "position", "rope_base", "rope_fraction", "rope_scaling", "attention_scale",
            "attention_dropout", *(f"bias.{letter}" for letter in ATTENTION_BIAS),
        }
    )  # fmt: skip

    def reads_of(self, model: ModelConfig) -> frozenset[str]:
        """Return them, and norm_eps."""
        return self.reads | {"norm_eps"}

    def weights(self, model: ModelConfig) -> Named:
        """Yield the projections to the latents, those of heads, and the output."""
        table, n, h, has_bias = _table(model), model.num_heads, model.hidden_size, "q" in model.bias
        a, c, r, width = table.q_lora_rank, table.kv_lora_rank, table.qk_rope_head_dim, _width(model)

        def whole(name: str, rows: int) -> Named:
            yield f"{name}.weight", matrix(rows, h)
            if has_bias:
                yield f"{name}.bias", vector(rows)

        if a:
            yield from whole("q_a", a)
            yield "q_a_norm.weight", vector(a)
            yield "q_b.weight", matrix(n * width, a, OVER_TP)
        else:
            yield "q.weight", matrix(n * width, h, OVER_TP)
        yield from whole("kv_a", c)
        yield from whole("k_rope", r)
        yield "kv_a_norm.weight", vector(c)
        yield "k_b.weight", matrix(n * table.qk_nope_head_dim, c, OVER_TP)
        yield "v_b.weight", matrix(n * table.v_head_dim, c, OVER_TP)
        yield "output.weight", matrix(h, n * table.v_head_dim, OVER_TP)
        if has_bias:
            yield "output.bias", vector(h)

    def mixing_flops(self, model: ModelConfig, seq_len: int, *, causal: bool) -> float:
        """Return the operations of the scores and of the values' sum."""
        positions = (seq_len + 1) / 2 if causal else float(seq_len)
        return 2.0 * model.num_heads * (_width(model) + _table(model).v_head_dim) * positions

    def kept(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return what stands at the head of this file."""
        table, heads = _table(model), model.num_heads / degrees.tp
        a, c = table.q_lora_rank, table.kv_lora_rank
        own = heads * 2 * (_width(model) + table.v_head_dim)
        if degrees.cp > 1 and degrees.context == "ulysses":
            own += heads * table.v_head_dim
        latents = 2 * (a + c) / degrees.tp
        normed = normed_input(model, 3, degrees, types)
        return (
            norm_inputs(model, self.place, degrees, types)
            + normed
            + (own + latents) * types.product
            + heads * types.wide
        )

    def at_work(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return what attention over cp holds, as for heads of the mean of both widths."""
        if degrees.cp == 1:
            return 0.0
        heads, mean = model.num_heads / degrees.tp, (_width(model) + _table(model).v_head_dim) / 2
        blocks = 4 * heads if degrees.cp > 2 else 2 * heads
        return ((blocks - heads / 2) * types.product + 7 * heads * types.wide) * mean

    def state_bytes(self, model: ModelConfig, tokens: int, width: int) -> float:
        """Return the bytes of the latents and rotary keys of all tokens."""
        return float((_table(model).kv_lora_rank + _table(model).qk_rope_head_dim) * tokens * width)

    def problems(self, model: ModelConfig, choose: Choose) -> list[str]:
        """Return what is wrong with the heads and the rotary features."""
        found, r = [], _table(model).qk_rope_head_dim
        if not model.num_heads:
            found.append("model.num_heads: is missing; a pattern with attention needs it, or a preset that has it")
        if r % 2:
            found.append(
                f"model.latent.qk_rope_head_dim = {r}: must be even, because RoPE turns pairs; {r + 1} would fit"
            )
        rule = "latent attention (+) has rotary features of its own, all of them turned"
        if model.position != "rope":
            found.append(f'model.position = "{model.position}": {rule}; "rope" would fit')
        if model.rope_fraction != 1.0:
            found.append(f"model.rope_fraction = {model.rope_fraction}: {rule}; 1.0 would fit")
        given = [letter for letter in ATTENTION_BIAS if letter in model.bias]
        if len(given) not in (0, len(ATTENTION_BIAS)):
            whole = json.dumps([*ATTENTION_BIAS, *(["ffn"] if "ffn" in model.bias else [])])
            found.append(
                f"model.bias = {json.dumps(model.bias)}: latent attention (+) has one switch for the biases of its"
                f" latents and its output; {whole} would fit, or none of {json.dumps(ATTENTION_BIAS)}"
            )
        return [*found, *scaling_problems(model, r, f"model.latent.qk_rope_head_dim = {r}")]

    def needs(self, model: ModelConfig) -> list[Need]:
        """Return that tp divides the heads."""
        return [Need("heads", "model.num_heads", model.num_heads)] if model.num_heads else []

    def narrowed(self, model: ModelConfig, small: Small, above: int) -> dict[str, Any]:
        """Return narrow latents and heads."""
        table = _table(model)
        c = small.inner(table.kv_lora_rank, 1, 1, above=above)
        a = small.inner(table.q_lora_rank, 1, 1, above=c) if table.q_lora_rank else 0
        sizes = {"kv_lora_rank": c, "q_lora_rank": a, "qk_rope_head_dim": min(table.qk_rope_head_dim, 4)}
        sizes |= {"qk_nope_head_dim": min(table.qk_nope_head_dim, 6), "v_head_dim": min(table.v_head_dim, 8)}
        return {"latent": table.model_copy(update=sizes)}


def _table(model: ModelConfig) -> LatentConfig:
    assert model.latent is not None, "the checks let no + pass without a [model.latent]"
    return model.latent


def _width(model: ModelConfig) -> int:
    """Return the width of a head's queries and keys."""
    return _table(model).qk_nope_head_dim + _table(model).qk_rope_head_dim
