"""`bloom`, BloomForCausalLM: ALiBi, LayerNorm with a norm behind the embedding, GELU, biases everywhere.

layers.N.mixer.part.q, k, v    transformer.h.N.self_attention.query_key_value   [3h, h], bias [3h]   by heads
layers.N.mixer.part.output     transformer.h.N.self_attention.dense
layers.N.feedforward.part.up   transformer.h.N.mlp.dense_h_to_4h                (down -> dense_4h_to_h)
embedding_norm                 transformer.word_embeddings_layernorm

Old files leave `transformer.` out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family, Row
from meshwright.model.families.rules import Parts, head_reasons, only, reasons
from meshwright.model.families.ssm import joined_rows
from meshwright.model.families.table import ATTENTION_BIASES, Names, linear_rows, stack_rows

NAMES = Names(
    "transformer.word_embeddings",
    "transformer.h",
    final="transformer.ln_f",
    embedding_norm="transformer.word_embeddings_layernorm",
)
PARTS = Parts(("attention",), ("mlp",), "'*-'")
RULES = {
    "position": only("alibi"),
    "norm": only("layernorm"),
    "embedding_norm": only(True, why="Bloom has a norm behind its embedding"),
    "ffn_activation": only("gelu_tanh"),
}
FIXED = {
    "apply_residual_connection_post_layernorm": (False,),
    "slow_but_exact": (False, True),  # another order of the same sums
}
NEEDED = ("vocab_size", "hidden_size", "n_layer", "n_head")


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a Bloom cannot be this model."""
    return reasons(config, PARTS, RULES) + plain_reasons(config, "Bloom", 4 * config.hidden_size)


def plain_reasons(config: ModelConfig, name: str, width: int | None) -> list[str]:
    """Return what speaks against heads of their own keys and values, biases everywhere and a feed-forward of 4h."""
    found, n = [], config.num_heads
    if config.num_kv_heads != n:
        found.append(f"model.num_kv_heads = {config.num_kv_heads}: {name} has as many as model.num_heads = {n}")
    found += head_reasons(config, name)
    if width is not None and config.ffn_hidden_size != width:
        found.append(f"model.ffn_hidden_size = {config.ffn_hidden_size}: {name}'s is {width}, 4 * model.hidden_size")
    missing = [part for part in (*ATTENTION_BIASES, "ffn") if part not in config.bias]
    if missing:
        found.append(f"model.bias lacks {missing}: {name} has biases everywhere")
    return found


def mapping(config: ModelConfig) -> Iterator[Row]:
    """Yield all tensors of a Bloom."""
    return stack_rows(config, {"attention": _attention_rows, "mlp": _mlp_rows}, NAMES)


def _attention_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    h, there = config.hidden_size, f"{theirs}.self_attention"
    columns = dict.fromkeys(("q", "k", "v"), h)
    yield from joined_rows(ours, f"{there}.query_key_value", columns, (h,), bias=True, groups=config.num_heads)
    yield from linear_rows(f"{ours}.output", f"{there}.dense", (h, h), bias=True)


def _mlp_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    h, f = config.hidden_size, config.ffn_hidden_size
    yield from linear_rows(f"{ours}.up", f"{theirs}.mlp.dense_h_to_4h", (f, h), bias=True)
    yield from linear_rows(f"{ours}.down", f"{theirs}.mlp.dense_4h_to_h", (h, f), bias=True)


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a Bloom's config.json."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a Bloom's config.json."""
    return {
        "pattern": "*-",
        "vocab_size": foreign["vocab_size"],
        "hidden_size": foreign["hidden_size"],
        "num_layers": foreign["n_layer"],
        "num_heads": foreign["n_head"],
        "ffn_hidden_size": 4 * foreign["hidden_size"],
        "ffn_activation": "gelu_tanh",
        "position": "alibi",
        "norm": "layernorm",
        "norm_eps": float(foreign.get("layer_norm_epsilon", 1e-5)),
        "embedding_norm": True,
        "bias": [*ATTENTION_BIASES, "ffn"],
        "init_std": float(foreign.get("initializer_range", 0.02)),
        "tie_embeddings": foreign.get("tie_word_embeddings", True),
        "residual_dropout": float(foreign.get("hidden_dropout", 0.0)),
        "attention_dropout": float(foreign.get("attention_dropout", 0.0)),
    }


BLOOM = Family(
    "bloom",
    "BloomForCausalLM",
    reasons_against,
    mapping,
    to_foreign,
    to_ours,
    NEEDED,
    FIXED,
    aliases={"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    prefix="transformer.",
)
