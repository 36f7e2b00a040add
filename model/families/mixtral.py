"""`mixtral`, MixtralForCausalLM: a MoE in every layer, softmax over the chosen experts, no QK-norm.

layers.N.feedforward.part.router.weight       model.layers.N.block_sparse_moe.gate.weight           [e, h]
layers.N.feedforward.part.experts.gate [i]    model.layers.N.block_sparse_moe.experts.i.w1.weight   [f, h]
layers.N.feedforward.part.experts.up   [i]    model.layers.N.block_sparse_moe.experts.i.w3.weight   [f, h]
layers.N.feedforward.part.experts.down [i]    model.layers.N.block_sparse_moe.experts.i.w2.weight   [h, f]
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family, Row
from meshwright.model.families.rules import ANY, ROPE, Parts, no_bias, only, reasons
from meshwright.model.families.table import (
    ATTENTION_BIASES,
    NEEDED,
    attention_rows,
    balancing_to_ours,
    common_keys,
    common_keys_to_ours,
    expert_rows,
    stack_rows,
    with_defaults,
)

EXPERT_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
NOT_NORMALISED = only(
    True,
    why="Mixtral divides the chosen experts' weights by their sum",
    way_out="Qwen3Moe and OLMoE (both with qk_norm = true) take both",
)
PARTS = Parts(("attention",), ("moe",), "'*E'")
RULES = {**ROPE, "moe.normalise_top_k": NOT_NORMALISED}
FIXED = {"hidden_act": ("silu",), "attention_dropout": (0.0,), "sliding_window": (None,)}


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a Mixtral cannot be this model."""
    # With every expert chosen the chosen scores sum to 1 already.
    all_chosen = config.moe is not None and config.moe.top_k == config.moe.num_experts
    rules = RULES | ({"moe.normalise_top_k": ANY} if all_chosen else {})
    return reasons(config, PARTS, rules) + no_bias(config, [*ATTENTION_BIASES, "ffn"], "Mixtral has")


def mapping(config: ModelConfig) -> Iterator[Row]:
    """Yield all tensors of a Mixtral."""
    experts = partial(expert_rows, names=EXPERT_NAMES, block="block_sparse_moe")
    return stack_rows(config, {"attention": attention_rows, "moe": experts})


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Mixtral's config.json."""
    return common_keys(config) | {
        "router_jitter_noise": 0.0,
        **expert_keys(config, "intermediate_size"),
    }


def expert_keys(config: ModelConfig, width: str) -> dict[str, Any]:
    """Return the keys of the experts, which many families call so; `width` is the name of an expert's width."""
    assert config.moe is not None
    return {
        width: config.moe.expert_hidden_size,
        "num_local_experts": config.moe.num_experts,
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": config.moe.load_balancing_weight,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a Mixtral's config.json."""
    keys = with_defaults(foreign, num_key_value_heads=8, rms_norm_eps=1e-5)
    return common_keys_to_ours(keys, default_rope_base=1_000_000.0) | {
        "pattern": "*E",
        "ffn_hidden_size": foreign["intermediate_size"],
        "moe": {
            "num_experts": foreign.get("num_local_experts", 8),
            "top_k": foreign.get("num_experts_per_tok", 2),
            "expert_hidden_size": foreign["intermediate_size"],
            "normalise_top_k": True,
            "load_balancing_weight": balancing_to_ours(foreign, 0.001),
        },
    }


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    reasons_against,
    mapping,
    to_foreign,
    to_ours,
    NEEDED,
    FIXED,
    aliases={"num_experts": "num_local_experts"},
    not_null=("num_key_value_heads", "router_aux_loss_coef"),
)
