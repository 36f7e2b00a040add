"""`qwen3_moe`, Qwen3MoeForCausalLM: QK-norm, and in each layer either a MoE or a dense MLP.

    layers.N.feedforward.part.router.weight       model.layers.N.mlp.gate.weight                  [e, h]
    layers.N.feedforward.part.experts.gate [i]    model.layers.N.mlp.experts.i.gate_proj.weight   [f, h]   (up)
    layers.N.feedforward.part.experts.down [i]    model.layers.N.mlp.experts.i.down_proj.weight   [h, f]
    layers.N.feedforward.part.gate.weight         model.layers.N.mlp.gate_proj.weight             a dense layer's

`mlp_only_layers` lists the dense layers; `norm_topk_prob` says whether the chosen experts' weights are divided by their
sum (llama.cpp always divides: docs/export.md).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family, Row
from meshwright.model.families.mixtral import expert_keys
from meshwright.model.families.qwen3 import FIXED, no_sliding_window
from meshwright.model.families.rules import ANY, ROPE, Parts, all_or_none, no_bias, only, reasons
from meshwright.model.families.table import (
    ATTENTION_BIASES,
    NEEDED,
    attention_bias_parts,
    balancing_to_ours,
    common_keys,
    common_keys_to_ours,
    expert_rows,
    experts_of,
    full_attention_alone,
    mlp_rows,
    normed_attention_rows,
    shortest_pattern,
    stack_rows,
    with_defaults,
)

PARTS = Parts(("attention",), ("mlp", "moe"), "'*E' or '*E*-'")
RULES = {
    **ROPE,
    "qk_norm": only(True, why="Qwen3Moe has norms of queries and keys", way_out="Mixtral has none"),
    "moe.normalise_top_k": ANY,
}


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a Qwen3Moe cannot be this model."""
    found = reasons(config, PARTS, RULES)
    if config.moe is None:
        found.append(f"model.pattern = {config.pattern!r}: has no experts; '*E' can be exported, and Qwen3 is dense")
    return found + all_or_none(config, ATTENTION_BIASES) + no_bias(config, ["ffn"], "Qwen3Moe's experts have")


def mapping(config: ModelConfig) -> Iterator[Row]:
    """Yield all tensors of a Qwen3Moe."""
    return stack_rows(config, {"attention": normed_attention_rows, "mlp": mlp_rows, "moe": expert_rows})


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Qwen3Moe's config.json."""
    return (
        common_keys(config)
        | no_sliding_window(config)
        | expert_keys(config, "moe_intermediate_size")
        | dense_layer_keys(config)
        | {"intermediate_size": config.ffn_hidden_size, "norm_topk_prob": experts_of(config).normalise_top_k}
    )


def dense_layer_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that say which layers have no experts."""
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n for n, kinds in enumerate(config.layers) if kinds.feedforward == "mlp"],
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a Qwen3Moe's config.json."""
    full_attention_alone(foreign)
    letters = feedforward_letters(foreign)
    common = common_keys_to_ours(with_defaults(foreign, num_key_value_heads=4), default_rope_base=10_000.0)
    return common | {
        "pattern": shortest_pattern([f"*{letter}" for letter in letters]),
        "ffn_hidden_size": foreign["intermediate_size"],
        "qk_norm": True,
        "bias": attention_bias_parts(foreign),
        **({"moe": _experts(foreign)} if "E" in letters else {}),
    }


def _experts(foreign: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": foreign.get("num_experts", 128),
        "top_k": foreign.get("num_experts_per_tok", 8),
        "expert_hidden_size": foreign["moe_intermediate_size"],
        "normalise_top_k": foreign.get("norm_topk_prob", False),
        "load_balancing_weight": balancing_to_ours(foreign, 0.001),
    }


def feedforward_letters(foreign: Mapping[str, Any]) -> list[str]:
    """Return the letter of each layer's feed-forward."""
    dense = set(foreign.get("mlp_only_layers") or [])
    every = foreign.get("decoder_sparse_step", 1)
    return ["-" if n in dense or (n + 1) % every != 0 else "E" for n in range(foreign["num_hidden_layers"])]


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    reasons_against,
    mapping,
    to_foreign,
    to_ours,
    (*NEEDED, "moe_intermediate_size"),
    FIXED,
    aliases={"num_local_experts": "num_experts"},
    not_null=("head_dim", "num_key_value_heads", "router_aux_loss_coef"),
)
