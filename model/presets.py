"""Shapes by name: `preset = "llama3-8b"` in a run file, `preset("llama3-8b", num_layers=2)` in Python.

    tiny small medium large          dense, of ours: 0.1 M (tests), 85 M, 302 M, 1.1 B weights in the layers
    moe-tiny moe-small               the same widths with experts
    gpt-tiny gpt-small gpt-medium    the width, layers, heads and feed-forward of the small GPTs
    llama* mixtral* qwen*            public shapes, with their published parameter counts

A preset is a table of [model] keys; a key that a user writes beside it wins. `vocab_size` is the tokenizer's where a
preset names none. The shapes are the published ones; Llama 3.1 and 3.2 also stretch RoPE beyond 8192 tokens, which
`rope_base` alone does not.
"""

from collections.abc import Mapping
from typing import Any

from meshwright.model.config import ModelConfig

Keys = Mapping[str, Any]

_LLAMA3: Keys = {"pattern": "*-", "vocab_size": 128256, "num_kv_heads": 8, "norm_eps": 1e-5, "rope_base": 500_000.0}

PRESETS: Mapping[str, Keys] = {
    "tiny": {"pattern": "*-", "num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2},
    "small": {"pattern": "*-", "num_layers": 12, "hidden_size": 768, "num_heads": 12, "tie_embeddings": True},
    "medium": {"pattern": "*-", "num_layers": 24, "hidden_size": 1024, "num_heads": 16, "tie_embeddings": True},
    "large": {"pattern": "*-", "num_layers": 24, "hidden_size": 2048, "num_heads": 16, "num_kv_heads": 8},
    "moe-tiny": {
        "pattern": "*E",
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "moe": {"num_experts": 4, "top_k": 2, "expert_hidden_size": 96},
    },
    "moe-small": {
        "pattern": "*E",
        "num_layers": 12,
        "hidden_size": 768,
        "num_heads": 12,
        "num_kv_heads": 4,
        "qk_norm": True,
        "moe": {"num_experts": 32, "top_k": 4, "expert_hidden_size": 512},
    },
    "gpt-tiny": {"pattern": "*-", "num_layers": 4, "hidden_size": 256, "num_heads": 4, "ffn_hidden_size": 1024},
    "gpt-small": {"pattern": "*-", "num_layers": 12, "hidden_size": 768, "num_heads": 12, "ffn_hidden_size": 3072},
    "gpt-medium": {"pattern": "*-", "num_layers": 24, "hidden_size": 1024, "num_heads": 16, "ffn_hidden_size": 4096},
    # Llama 3.2 1B
    "llama3-1b": {
        **_LLAMA3,
        "num_layers": 16,
        "hidden_size": 2048,
        "num_heads": 32,
        "head_dim": 64,
        "ffn_hidden_size": 8192,
        "tie_embeddings": True,
    },
    "llama3-8b": {**_LLAMA3, "num_layers": 32, "hidden_size": 4096, "num_heads": 32, "ffn_hidden_size": 14336},
    # Llama 3.1 405B
    "llama3-405b": {**_LLAMA3, "num_layers": 126, "hidden_size": 16384, "num_heads": 128, "ffn_hidden_size": 53248},
    "llama2-70b": {
        "pattern": "*-",
        "num_layers": 80,
        "hidden_size": 8192,
        "num_heads": 64,
        "num_kv_heads": 8,
        "ffn_hidden_size": 28672,
        "vocab_size": 32000,
        "norm_eps": 1e-5,
        "rope_base": 10_000.0,
    },
    "mixtral-8x7b": {
        "pattern": "*E",
        "num_layers": 32,
        "hidden_size": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "vocab_size": 32000,
        "norm_eps": 1e-5,
        "rope_base": 1_000_000.0,
        "moe": {"num_experts": 8, "top_k": 2, "expert_hidden_size": 14336},
    },
    "qwen3-30b-a3b": {
        "pattern": "*E",
        "num_layers": 48,
        "hidden_size": 2048,
        "num_heads": 32,
        "num_kv_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "norm_eps": 1e-6,
        "rope_base": 1_000_000.0,
        "qk_norm": True,
        "moe": {"num_experts": 128, "top_k": 8, "expert_hidden_size": 768},
    },
}


def with_preset(table: Keys) -> dict[str, Any]:
    """Return the [model] keys with those of the preset that they name laid beneath; keys within `moe` likewise.

    Raises:
        ValueError: if there is no preset of that name.
    """
    name = table.get("preset", "")
    if name == "":
        return dict(table)
    if name not in PRESETS:
        raise ValueError(f"there is no such preset; the presets are: {', '.join(PRESETS)}")
    beneath = PRESETS[name]
    merged = {**beneath, **table}
    if isinstance(beneath.get("moe"), Mapping) and isinstance(table.get("moe"), Mapping):
        merged["moe"] = {**beneath["moe"], **table["moe"]}
    return merged


def preset(name: str, **changes: Any) -> ModelConfig:
    """Return a preset's config, with some keys changed: `preset("moe-tiny", vocab_size=512, moe={"top_k": 1})`.

    Raises:
        ValueError: if there is no such preset, or the changed sizes make no model.
    """
    config = ModelConfig.model_validate(with_preset({**changes, "preset": name}))
    if problems := config.problems():
        raise ValueError("\n".join(problems))
    return config
