"""`qwen3_moe`, Qwen3MoeForCausalLM: QK-norm, and in each layer either a MoE or a dense MLP.

    layers.N.feedforward.part.router.weight       model.layers.N.mlp.gate.weight                  [e, h]
    layers.N.feedforward.part.experts.gate [i]    model.layers.N.mlp.experts.i.gate_proj.weight   [f, h]   (up)
    layers.N.feedforward.part.experts.down [i]    model.layers.N.mlp.experts.i.down_proj.weight   [h, f]
    layers.N.feedforward.part.gate.weight         model.layers.N.mlp.gate_proj.weight             a dense layer's

`mlp_only_layers` lists the dense layers; `norm_topk_prob` says whether the chosen experts' weights are
divided by their sum (llama.cpp always divides: docs/export.md).
"""

from collections.abc import Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family, Row
from meshwright.model.families.qwen3 import no_sliding_window
from meshwright.model.families.table import (
    MLP_NAMES,
    NEEDED,
    attention_bias_parts,
    attention_bias_reasons,
    common_keys,
    common_keys_to_ours,
    common_reasons,
    expert_rows,
    experts_of,
    mlp_rows,
    moe_reasons,
    stack_rows,
)
from meshwright.model.pattern import LayerKinds


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a Qwen3Moe cannot be this model."""
    return common_reasons(config) + attention_bias_reasons(config) + moe_reasons(config)


def mapping(config: ModelConfig) -> list[Row]:
    """Return all tensors of a Qwen3Moe."""
    return stack_rows(config, _feedforward_rows)


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Qwen3Moe's config.json."""
    moe = experts_of(config)
    layers = config.layers
    return (
        common_keys(config)
        | no_sliding_window(config)
        | {
            "intermediate_size": config.ffn_hidden_size,
            "moe_intermediate_size": moe.expert_hidden_size,
            "num_local_experts": moe.num_experts,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": moe.normalise_top_k,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [n for n, kinds in enumerate(layers) if kinds.feedforward == "mlp"],
            "output_router_logits": False,
            "router_aux_loss_coef": moe.load_balancing_weight,
        }
    )


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a Qwen3Moe's config.json."""
    common = common_keys_to_ours(foreign, default_rope_base=10_000.0)
    return common | {
        "pattern": _pattern(foreign, common["num_layers"]),
        "ffn_hidden_size": foreign["intermediate_size"],
        "qk_norm": True,
        "bias": attention_bias_parts(foreign),
        "moe": {
            "num_experts": foreign.get("num_experts", foreign.get("num_local_experts", 128)),
            "top_k": foreign.get("num_experts_per_tok", 8),
            "expert_hidden_size": foreign["moe_intermediate_size"],
            "normalise_top_k": foreign.get("norm_topk_prob", False),
        },
    }


def _pattern(foreign: Mapping[str, Any], num_layers: int) -> str:
    """Return the shortest period of `*E` and `*-` that gives the layers."""
    dense = set(foreign.get("mlp_only_layers") or [])
    every = foreign.get("decoder_sparse_step", 1)
    letters = ["*-" if n in dense or (n + 1) % every != 0 else "*E" for n in range(num_layers)]
    for period in range(1, num_layers + 1):
        if num_layers % period == 0 and letters[:period] * (num_layers // period) == letters:
            return "".join(letters[:period])
    raise AssertionError("the whole list is always a period of itself")


def _feedforward_rows(config: ModelConfig, n: int, kinds: LayerKinds) -> list[Row]:
    ours, theirs = f"layers.{n}.feedforward.part", f"model.layers.{n}.mlp"
    if kinds.feedforward == "mlp":
        return mlp_rows(config, ours, theirs)
    return expert_rows(config, ours, theirs, MLP_NAMES)


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    reasons_against,
    mapping,
    to_foreign,
    to_ours,
    (*NEEDED, "moe_intermediate_size"),
)
