"""`olmoe`, OlmoeForCausalLM: a MoE in every layer, norms of queries and keys over all heads of a token.

layers.N.mixer.part.q_norm.weight             model.layers.N.self_attn.q_norm.weight            [n*d]    (k_norm [k*d])
layers.N.feedforward.part.router.weight       model.layers.N.mlp.gate.weight                    [e, h]
layers.N.feedforward.part.experts.gate [i]    model.layers.N.mlp.experts.i.gate_proj.weight     [f, h]   (up, down)
"""

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family, Row
from meshwright.model.families.mixtral import expert_keys
from meshwright.model.families.olmo2 import OVER_TOKENS, normed_over_tokens_rows
from meshwright.model.families.rules import ANY, ROPE, Parts, all_or_none, head_reasons, no_bias, reasons
from meshwright.model.families.table import (
    ATTENTION_BIASES,
    NEEDED,
    attention_bias_parts,
    balancing_to_ours,
    common_keys,
    common_keys_to_ours,
    expert_rows,
    experts_of,
    stack_rows,
    with_defaults,
)

PARTS = Parts(("attention",), ("moe",), "'*E'")
RULES = {**ROPE, **OVER_TOKENS, "moe.normalise_top_k": ANY}
FIXED = {"hidden_act": ("silu",), "attention_dropout": (0.0,), "clip_qkv": (None,), "sliding_window": (None,)}


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why an OLMoE cannot be this model."""
    found = reasons(config, PARTS, RULES) + all_or_none(config, ATTENTION_BIASES)
    found += head_reasons(config, "OLMoE")
    return found + no_bias(config, ["ffn"], "OLMoE's experts have")


def mapping(config: ModelConfig) -> Iterator[Row]:
    """Yield all tensors of an OLMoE."""
    return stack_rows(config, {"attention": normed_over_tokens_rows, "moe": expert_rows})


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of an OLMoE's config.json."""
    return (
        common_keys(config)
        | expert_keys(config, "intermediate_size")
        | {"attention_bias": "q" in config.bias, "norm_topk_prob": experts_of(config).normalise_top_k}
    )


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from an OLMoE's config.json."""
    return common_keys_to_ours(with_defaults(foreign, rms_norm_eps=1e-5), default_rope_base=10_000.0) | {
        "pattern": "*E",
        "ffn_hidden_size": foreign["intermediate_size"],
        "qk_norm": True,
        "qk_norm_over": "tokens",
        "bias": attention_bias_parts(foreign),
        "moe": {
            "num_experts": foreign.get("num_experts", 64),
            "top_k": foreign.get("num_experts_per_tok", 8),
            "expert_hidden_size": foreign["intermediate_size"],
            "normalise_top_k": foreign.get("norm_topk_prob", False),
            "load_balancing_weight": balancing_to_ours(foreign, 0.01),
        },
    }


OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    reasons_against,
    mapping,
    to_foreign,
    to_ours,
    NEEDED,
    FIXED,
    aliases={"num_local_experts": "num_experts"},
    not_null=("head_dim", "router_aux_loss_coef"),
)
