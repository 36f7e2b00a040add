"""`qwen3`, Qwen3ForCausalLM: dense, SwiGLU, an RMSNorm on each head's queries and keys before RoPE.

layers.N.mixer.part.q_norm.weight       model.layers.N.self_attn.q_norm.weight   [d]      (k_norm)
layers.N.feedforward.part.gate.weight   model.layers.N.mlp.gate_proj.weight      [f, h]   (up, down)
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
    """Return every reason why a Qwen3 cannot be this model."""
    reasons = common_reasons(config) + attention_bias_reasons(config)
    if "ffn" in config.bias:
        reasons.append(
            "model.bias has 'ffn': Qwen3's MLP has no biases; leave 'ffn' out, or take Llama (qk_norm = false)"
        )
    return reasons


def mapping(config: ModelConfig) -> list[Row]:
    """Return all tensors of a Qwen3."""
    return stack_rows(config, _feedforward_rows)


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Qwen3's config.json."""
    return common_keys(config) | no_sliding_window(config) | {"intermediate_size": config.ffn_hidden_size}


def no_sliding_window(config: ModelConfig) -> dict[str, Any]:
    """Return the keys, the same in both Qwen3 classes, by which every layer attends to all earlier tokens."""
    return {
        "attention_bias": "q" in config.bias,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_layers,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a Qwen3's config.json."""
    # Qwen3Config's head_dim is 128 where a file does not name one, and never hidden_size / num_heads.
    return common_keys_to_ours({"head_dim": 128} | dict(foreign), default_rope_base=10_000.0) | {
        "pattern": "*-",
        "ffn_hidden_size": foreign["intermediate_size"],
        "qk_norm": True,
        "bias": attention_bias_parts(foreign),
    }


def _feedforward_rows(config: ModelConfig, n: int, kinds: LayerKinds) -> list[Row]:
    return mlp_rows(config, f"layers.{n}.feedforward.part", f"model.layers.{n}.mlp")


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", reasons_against, mapping, to_foreign, to_ours, NEEDED)
