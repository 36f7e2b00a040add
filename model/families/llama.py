"""`llama`, LlamaForCausalLM: dense, SwiGLU, without norms on queries and keys.

layers.N.feedforward.part.gate.weight   model.layers.N.mlp.gate_proj.weight   [f, h]   (up, down)
"""

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family, Row
from meshwright.model.families.rules import ROPE, Parts, all_or_none, only, reasons
from meshwright.model.families.table import (
    ATTENTION_BIASES,
    NEEDED,
    attention_bias_parts,
    attention_rows,
    common_keys,
    common_keys_to_ours,
    mlp_rows,
    stack_rows,
)

PARTS = Parts(("attention",), ("mlp",), "'*-'")
RULES = {
    **ROPE,
    "qk_norm": only(False, why="a Llama has no norms of queries and keys", way_out="Qwen3 has them"),
}
FIXED = {"hidden_act": ("silu",), "attention_dropout": (0.0,), "pretraining_tp": (1,)}


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a Llama cannot be this model."""
    found = reasons(config, PARTS, RULES) + all_or_none(config, ATTENTION_BIASES)
    if config.num_heads and config.hidden_size % config.num_heads != 0:
        found.append(
            f"model.num_heads = {config.num_heads}: LlamaConfig refuses heads that do not divide "
            f"model.hidden_size = {config.hidden_size}, whatever head_dim is; Qwen3 (qk_norm = true) has no such rule"
        )
    return found


def mapping(config: ModelConfig) -> Iterator[Row]:
    """Yield all tensors of a Llama."""
    return stack_rows(config, {"attention": attention_rows, "mlp": mlp_rows})


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Llama's config.json."""
    return common_keys(config) | {
        "intermediate_size": config.ffn_hidden_size,
        "attention_bias": "q" in config.bias,
        "mlp_bias": "ffn" in config.bias,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a Llama's config.json."""
    mlp_bias = ["ffn"] if foreign.get("mlp_bias", False) else []
    return common_keys_to_ours(foreign, default_rope_base=10_000.0) | {
        "pattern": "*-",
        "ffn_hidden_size": foreign["intermediate_size"],
        "bias": attention_bias_parts(foreign) + mlp_bias,
    }


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    reasons_against,
    mapping,
    to_foreign,
    to_ours,
    NEEDED,
    FIXED,
    ignored=r"rotary_emb\.inv_freq$",
)
