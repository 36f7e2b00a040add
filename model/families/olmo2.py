"""`olmo2`, Olmo2ForCausalLM: dense, SwiGLU, norms behind the parts, and of queries and keys over all heads of a token.

layers.N.mixer.post_norm.weight         model.layers.N.post_attention_layernorm.weight     [h]
layers.N.feedforward.post_norm.weight   model.layers.N.post_feedforward_layernorm.weight   [h]
layers.N.mixer.part.q_norm.weight       model.layers.N.self_attn.q_norm.weight             [n*d]   (k_norm [k*d])
"""

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family, Row, same
from meshwright.model.families.rules import ROPE, Parts, all_or_none, no_bias, only, reasons
from meshwright.model.families.table import (
    ATTENTION_BIASES,
    NEEDED,
    Names,
    attention_bias_parts,
    attention_rows,
    common_keys,
    common_keys_to_ours,
    mlp_rows,
    stack_rows,
    with_defaults,
)

NAMES = Names(behind={"mixer": "post_attention_layernorm", "feedforward": "post_feedforward_layernorm"})
PARTS = Parts(("attention",), ("mlp",), "'*-'")
OVER_TOKENS = {
    "qk_norm": only(True, why="OLMo has norms of queries and keys"),
    "qk_norm_over": only("tokens", way_out='Qwen3 has those over "heads"'),
}
RULES = {**ROPE, **OVER_TOKENS, "norm_placement": only("branch")}
FIXED = {"hidden_act": ("silu",), "attention_dropout": (0.0,)}


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why an OLMo2 cannot be this model."""
    found = reasons(config, PARTS, RULES) + all_or_none(config, ATTENTION_BIASES)
    return found + no_bias(config, ["ffn"], "OLMo2's MLP has")


def mapping(config: ModelConfig) -> Iterator[Row]:
    """Yield all tensors of an OLMo2."""
    return stack_rows(config, {"attention": normed_over_tokens_rows, "mlp": mlp_rows}, NAMES)


def normed_over_tokens_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    """Yield attention's rows with norms over all heads of a token."""
    yield from attention_rows(config, ours, theirs)
    for part, heads in (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads)):
        yield same(f"{ours}.{part}.weight", f"{theirs}.self_attn.{part}.weight", (heads * config.head_dim,))


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of an OLMo2's config.json."""
    return common_keys(config) | {
        "intermediate_size": config.ffn_hidden_size,
        "attention_bias": "q" in config.bias,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from an OLMo2's config.json."""
    return common_keys_to_ours(with_defaults(foreign, rms_norm_eps=1e-5), default_rope_base=10_000.0) | {
        "pattern": "*-",
        "ffn_hidden_size": foreign["intermediate_size"],
        "norm_placement": "branch",
        "qk_norm": True,
        "qk_norm_over": "tokens",
        "bias": attention_bias_parts(foreign),
    }


OLMO2 = Family(
    "olmo2", "Olmo2ForCausalLM", reasons_against, mapping, to_foreign, to_ours, NEEDED, FIXED, not_null=("head_dim",)
)
