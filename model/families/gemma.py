"""`gemma`, GemmaForCausalLM: dense, GeGLU, norms that multiply by 1 + weight, embeddings times sqrt(h).

layers.N.feedforward.part.gate.weight   model.layers.N.mlp.gate_proj.weight   [f, h]   (up, down)
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family, Row
from meshwright.model.families.rules import ANY, ROPE, Parts, all_or_none, no_bias, only, reasons
from meshwright.model.families.table import (
    ATTENTION_BIASES,
    NEEDED,
    attention_bias_parts,
    attention_rows,
    common_keys,
    common_keys_to_ours,
    mlp_rows,
    stack_rows,
    with_defaults,
)

PARTS = Parts(("attention",), ("mlp",), "'*-'")
RULES = {
    **ROPE,
    "norm": only("rmsnorm_zero_centred"),
    "ffn_activation": only("geglu"),
    "embedding_multiplier": ANY,
}
FIXED = {
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    "hidden_activation": ("gelu_pytorch_tanh", None, "gelu"),
    "attention_dropout": (0.0,),
    "use_bidirectional_attention": (None, False),
}


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a Gemma cannot be this model."""
    found = reasons(config, PARTS, RULES) + all_or_none(config, ATTENTION_BIASES)
    root = math.sqrt(config.hidden_size)
    if not math.isclose(config.embedding_multiplier, root, rel_tol=1e-6):
        found.append(
            f"model.embedding_multiplier = {config.embedding_multiplier}: a Gemma multiplies by the root of"
            f" model.hidden_size = {config.hidden_size}; {root!r} can be exported"
        )
    return found + no_bias(config, ["ffn"], "Gemma's MLP has")


def mapping(config: ModelConfig) -> Iterator[Row]:
    """Yield all tensors of a Gemma."""
    return stack_rows(config, {"attention": attention_rows, "mlp": mlp_rows})


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Gemma's config.json."""
    return common_keys(config) | {
        "intermediate_size": config.ffn_hidden_size,
        "attention_bias": "q" in config.bias,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a Gemma's config.json."""
    # GemmaConfig's head_dim is 256 where a file does not name one.
    keys = with_defaults(foreign, head_dim=256, num_key_value_heads=16)
    return common_keys_to_ours(keys, default_rope_base=10_000.0, tied=True) | {
        "pattern": "*-",
        "ffn_hidden_size": foreign["intermediate_size"],
        "ffn_activation": "geglu",
        "norm": "rmsnorm_zero_centred",
        "embedding_multiplier": math.sqrt(foreign["hidden_size"]),
        "bias": attention_bias_parts(foreign),
    }


GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    reasons_against,
    mapping,
    to_foreign,
    to_ours,
    NEEDED,
    FIXED,
    not_null=("head_dim", "num_key_value_heads"),
)
