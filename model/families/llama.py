"""`llama`, LlamaForCausalLM: dense, SwiGLU, without norms on queries and keys.

layers.N.feedforward.part.gate.weight   model.layers.N.mlp.gate_proj.weight   [f, h]   (up, down)
"""

from collections.abc import Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family, Row
from meshwright.model.families.table import (
    NEEDED,
    attention_bias_parts,
    attention_bias_reasons,
    common_keys,
    common_keys_to_ours,
    common_reasons,
    mlp_rows,
    stack_rows,
)
from meshwright.model.pattern import LayerKinds


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a Llama cannot be this model."""
    reasons = common_reasons(config) + attention_bias_reasons(config)
    if config.hidden_size % config.num_heads != 0:
        reasons.append(
            f"model.num_heads = {config.num_heads}: LlamaConfig refuses heads that do not divide "
            f"model.hidden_size = {config.hidden_size}, whatever head_dim is; Qwen3 (qk_norm = true) has no such rule"
        )
    return reasons


def mapping(config: ModelConfig) -> list[Row]:
    """Return all tensors of a Llama."""
    return stack_rows(config, _feedforward_rows)


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Llama's config.json."""
    return common_keys(config) | {
        "intermediate_size": config.ffn_hidden_size,
        "attention_bias": "q" in config.bias,
        "mlp_bias": "ffn" in config.bias,
        "pretraining_tp": 1,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a Llama's config.json."""
    mlp_bias = ["ffn"] if foreign.get("mlp_bias", False) else []
    return common_keys_to_ours(foreign, default_rope_base=10_000.0) | {
        "pattern": "*-",
        "ffn_hidden_size": foreign["intermediate_size"],
        "qk_norm": False,
        "bias": attention_bias_parts(foreign) + mlp_bias,
    }


def _feedforward_rows(config: ModelConfig, n: int, kinds: LayerKinds) -> list[Row]:
    return mlp_rows(config, f"layers.{n}.feedforward.part", f"model.layers.{n}.mlp")


LLAMA = Family("llama", "LlamaForCausalLM", reasons_against, mapping, to_foreign, to_ours, NEEDED)
