"""`qwen3`, Qwen3ForCausalLM: dense, SwiGLU, an RMSNorm on each head's queries and keys before RoPE.

layers.N.mixer.part.q_norm.weight       model.layers.N.self_attn.q_norm.weight   [d]      (k_norm)
layers.N.feedforward.part.gate.weight   model.layers.N.mlp.gate_proj.weight      [f, h]   (up, down)
"""

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family, Row
from meshwright.model.families.rules import ROPE, Parts, all_or_none, no_bias, only, reasons
from meshwright.model.families.table import (
    ATTENTION_BIASES,
    NEEDED,
    attention_bias_parts,
    common_keys,
    common_keys_to_ours,
    full_attention_alone,
    mlp_rows,
    normed_attention_rows,
    stack_rows,
    with_defaults,
)

PARTS = Parts(("attention",), ("mlp",), "'*-'")
RULES = {
    **ROPE,
    "qk_norm": only(True, why="Qwen3 has norms of queries and keys", way_out="Llama has none"),
}
FIXED = {"hidden_act": ("silu",), "attention_dropout": (0.0,), "use_sliding_window": (False,)}


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a Qwen3 cannot be this model."""
    biases = all_or_none(config, ATTENTION_BIASES) + no_bias(config, ["ffn"], "Qwen3's MLP has")
    return reasons(config, PARTS, RULES) + biases


def mapping(config: ModelConfig) -> Iterator[Row]:
    """Yield all tensors of a Qwen3."""
    return stack_rows(config, {"attention": normed_attention_rows, "mlp": mlp_rows})


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Qwen3's config.json."""
    return common_keys(config) | no_sliding_window(config) | {"intermediate_size": config.ffn_hidden_size}


def no_sliding_window(config: ModelConfig) -> dict[str, Any]:
    """Return the keys, the same in both Qwen3 classes, by which every layer attends to all earlier tokens."""
    return {
        "attention_bias": "q" in config.bias,
        "sliding_window": None,
        "max_window_layers": config.num_layers,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a Qwen3's config.json."""
    # Qwen3Config's head_dim is 128 where a file does not name one, and never hidden_size / num_heads.
    full_attention_alone(foreign)
    keys = with_defaults(foreign, head_dim=128, num_key_value_heads=32)
    return common_keys_to_ours(keys, default_rope_base=10_000.0) | {
        "pattern": "*-",
        "ffn_hidden_size": foreign["intermediate_size"],
        "qk_norm": True,
        "bias": attention_bias_parts(foreign),
    }


QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM", reasons_against, mapping, to_foreign, to_ours, NEEDED, FIXED, not_null=("head_dim",)
)
