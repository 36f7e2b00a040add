"""SwitchHead attention as a description: its weights, operations and bytes (module: mixers/switch_head.py).

    source, destination [n*E, h]   v [n*E, d, h]   output [n*E, h, d]   q, k [n*d, h]      all cut with the heads

A token meets k of the E experts of each head, for its values and for its output.

Kept for each token that a mixer of this rank sees: h/tp of the norm's input, h of the normed one as it was gathered;
of the heads 4nd/tp as attention does (q, k, v, output), and knd/tp of the chosen experts' values and of the rows that
go into the output; the scores of all experts in at least fp32; of each choice the gate, and three numbers of eight
bytes that say where its rows stand, for its values and for its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from meshwright.model.kinds.kept import norm_inputs
from meshwright.model.kinds.kind import OVER_TP, Choose, Degrees, Kind, Named, Need, Types, Weight, matrix
from meshwright.model.kinds.mixers.attention import (
    LOOK_KEYS,
    attention_head_problems,
    position_problems,
    position_weights,
)
from meshwright.model.kinds.mixers.attention_keys import SwitchHeadConfig
from meshwright.parallel.fits import up_to

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig
    from meshwright.model.kinds.small import Small


@dataclass(frozen=True, eq=False)
class SwitchHeadKind(Kind):
    """Attention with experts in its values and output."""

    reads: ClassVar[frozenset[str]] = LOOK_KEYS

    def weights(self, model: ModelConfig) -> Named:
        """Yield gates, experts, q and k, in the module's order."""
        table, n, d, h = _table(model), model.num_heads, model.head_dim, model.hidden_size
        stack, met = n * table.num_experts, (table.top_k, table.num_experts)
        yield "source", matrix(stack, h, OVER_TP)
        yield "destination", matrix(stack, h, OVER_TP)
        yield "v", Weight((stack, d, h), OVER_TP, is_product=True, met_of=met)
        yield "output", Weight((stack, h, d), OVER_TP, is_product=True, met_of=met)
        yield "q.weight", matrix(n * d, h, OVER_TP)
        yield "k.weight", matrix(n * d, h, OVER_TP)
        yield from position_weights(model)

    def mixing_flops(self, model: ModelConfig, seq_len: int, *, causal: bool) -> float:
        """Return the operations of the scores and of the values' sum."""
        positions = (seq_len + 1) / 2 if causal else float(seq_len)
        return 4.0 * model.num_heads * model.head_dim * positions

    def kept(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return what stands at the head of this file."""
        heads, num_experts, top_k = model.num_heads / degrees.tp, _table(model).num_experts, _table(model).top_k
        own = heads * model.head_dim * (4 + 2 * top_k) * types.product
        if degrees.cp > 1 and degrees.context == "ulysses":
            own += heads * model.head_dim * types.product
        # Under autocast q, k and v each keep a copy in their own type, and the gates one in fp32.
        copies = types.inputs(3) + types.wide if types.is_cast else types.product
        if not types.is_cast and types.wide > types.product:
            copies += types.wide
        choices = heads * (
            2 * top_k * (types.wide + types.product * types.is_cast + 3 * 8) + 2 * num_experts * types.wide
        )
        return (
            norm_inputs(model, self.place, degrees, types)
            + model.hidden_size * copies
            + own
            + choices
            + heads * types.wide
        )

    def at_work(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return the rows of all choices as wide as the stream, and their gradient."""
        return 2 * model.num_heads / degrees.tp * _table(model).top_k * model.hidden_size * types.product

    def state_bytes(self, model: ModelConfig, tokens: int, width: int) -> float:
        """Return the bytes of the keys and values of all tokens, and of the choices for values and output."""
        choices = 2 * _table(model).top_k * (4 + max(4, width))
        return float(model.num_heads * (2 * model.head_dim * width + choices) * tokens)

    def problems(self, model: ModelConfig, choose: Choose) -> list[str]:
        """Return what is wrong with the heads and their experts."""
        found, table = [*attention_head_problems(model, choose), *position_problems(model)], _table(model)
        if table.top_k > table.num_experts:
            found.append(
                f"model.switch_head.top_k = {table.top_k}: must not exceed model.switch_head.num_experts ="
                f" {table.num_experts}; {up_to(table.num_experts)} would fit"
            )
        return found

    def needs(self, model: ModelConfig) -> list[Need]:
        """Return that tp divides the heads."""
        return [Need("heads", "model.num_heads", model.num_heads)] if model.num_heads else []

    def narrowed(self, model: ModelConfig, small: Small, above: int) -> dict[str, Any]:
        """Return few experts."""
        table = _table(model)
        top_k = min(table.top_k, 2)
        experts = top_k if table.top_k == table.num_experts else max(top_k + 1, min(table.num_experts, 3))
        return {"switch_head": table.model_copy(update={"num_experts": experts, "top_k": top_k})}


def _table(model: ModelConfig) -> SwitchHeadConfig:
    assert model.switch_head is not None, "the checks let no H pass without a [model.switch_head]"
    return model.switch_head
