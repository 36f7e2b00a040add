"""`mixtral`, MixtralForCausalLM: a MoE in every layer, softmax over the chosen experts, no QK-norm.

layers.N.feedforward.part.router.weight       model.layers.N.block_sparse_moe.gate.weight           [e, h]
layers.N.feedforward.part.experts.gate [i]    model.layers.N.block_sparse_moe.experts.i.w1.weight   [f, h]
layers.N.feedforward.part.experts.up   [i]    model.layers.N.block_sparse_moe.experts.i.w3.weight   [f, h]
layers.N.feedforward.part.experts.down [i]    model.layers.N.block_sparse_moe.experts.i.w2.weight   [h, f]
"""

from collections.abc import Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family, Row
from meshwright.model.families.table import (
    ATTENTION_BIASES,
    NEEDED,
    common_keys,
    common_keys_to_ours,
    common_reasons,
    expert_rows,
    experts_of,
    layer_list,
    moe_reasons,
    stack_rows,
)
from meshwright.model.pattern import LayerKinds

EXPERT_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a Mixtral cannot be this model."""
    reasons = common_reasons(config) + moe_reasons(config)
    moe = experts_of(config)
    dense = [n for n, kinds in enumerate(config.layers) if kinds.feedforward == "mlp"]
    if dense:
        reasons.append(
            f"model.pattern = {config.pattern!r}: {layer_list(dense)} an MLP, Mixtral has a MoE in every layer; "
            "Qwen3Moe (qk_norm = true) takes both"
        )
    # With every expert chosen the chosen scores sum to 1 already.
    if not moe.normalise_top_k and moe.top_k < moe.num_experts:
        reasons.append(
            "model.moe.normalise_top_k = false: Mixtral divides the chosen experts' weights by their sum; "
            "Qwen3Moe (qk_norm = true) takes both, OLMoE is no target yet"
        )
    biased = [part for part in ATTENTION_BIASES if part in config.bias]
    if biased:
        reasons.append(
            f"model.bias has {biased}: Mixtral's attention has no biases; leave them out, or take Qwen3Moe "
            "(qk_norm = true) with all of q, k, v, output"
        )
    return reasons


def mapping(config: ModelConfig) -> list[Row]:
    """Return all tensors of a Mixtral."""
    return stack_rows(config, _feedforward_rows)


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Mixtral's config.json."""
    moe = experts_of(config)
    return common_keys(config) | {
        "intermediate_size": moe.expert_hidden_size,
        "num_local_experts": moe.num_experts,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "sliding_window": None,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "router_aux_loss_coef": moe.load_balancing_weight,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a Mixtral's config.json."""
    return common_keys_to_ours(foreign, default_rope_base=1_000_000.0) | {
        "pattern": "*E",
        "ffn_hidden_size": foreign["intermediate_size"],
        "qk_norm": False,
        "bias": [],
        "moe": {
            "num_experts": foreign.get("num_local_experts", foreign.get("num_experts", 8)),
            "top_k": foreign.get("num_experts_per_tok", 2),
            "expert_hidden_size": foreign["intermediate_size"],
            "normalise_top_k": True,
        },
    }


def _feedforward_rows(config: ModelConfig, n: int, kinds: LayerKinds) -> list[Row]:
    return expert_rows(config, f"layers.{n}.feedforward.part", f"model.layers.{n}.block_sparse_moe", EXPERT_NAMES)


MIXTRAL = Family("mixtral", "MixtralForCausalLM", reasons_against, mapping, to_foreign, to_ours, NEEDED)
