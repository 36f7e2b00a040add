"""Shapes of ours: four architectures in six sizes, the small GPTs, and `switch_all`.

             tiny       small       medium       large        1b           8b
    width    64         768         1024         1536         2048         4096
    dense    2 layers   12          24           24           16           32      attention and MLP (a Llama)
    moe      2          12          24           24           16           32      attention and experts (a Qwen3Moe)
    mamba    4          24          48           48           48           72      Mamba-2 alone
    hybrid   4          10          20           20           20           30      Mamba-2 and MLP; a tenth attention

A token meets about as many weights in each of the four; experts come on top of those it meets. A hybrid is made of
Granite 4's blocks, which every inference engine loads: one group, two channels for each feature, convolutions with a
bias, no positions, muP's multipliers (scores by 1 / head_dim, logits by 256 / width).

`vocab_size` is the tokenizer's.
"""

from collections.abc import Mapping
from typing import Any

Keys = Mapping[str, Any]

_TINY: Keys = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2}
_SMALL: Keys = {"num_layers": 12, "hidden_size": 768, "num_heads": 12}
_MEDIUM: Keys = {"num_layers": 24, "hidden_size": 1024, "num_heads": 16}
_LARGE: Keys = {"num_layers": 24, "hidden_size": 1536, "num_heads": 12}
_1B: Keys = {"num_layers": 16, "hidden_size": 2048, "num_heads": 16, "num_kv_heads": 8, "rope_base": 500_000.0}
_8B: Keys = {"num_layers": 32, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8, "rope_base": 500_000.0}


def _experts(shape: Keys, num_kv_heads: int, *sizes: int) -> Keys:
    """Return a shape with experts: so many, so many of them for a token, so wide."""
    moe = dict(zip(("num_experts", "top_k", "expert_hidden_size"), sizes, strict=True))
    return {**shape, "pattern": "*E", "num_kv_heads": num_kv_heads, "qk_norm": True, "moe": moe}


def _mamba(num_layers: int, hidden_size: int) -> Keys:
    return {"pattern": "M", "num_layers": num_layers, "hidden_size": hidden_size, "tie_embeddings": hidden_size < 4096}


def _hybrid(num_layers: int, hidden_size: int, num_heads: int, num_kv_heads: int) -> Keys:
    return {
        "pattern": "5(M-)*-4(M-)",
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "position": "none",
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_scale": num_heads / hidden_size,
        "logits_scaling": hidden_size / 256,
        "tie_embeddings": hidden_size < 4096,
    }


OURS: Mapping[str, Keys] = {
    "dense-tiny": {**_TINY, "pattern": "*-"},
    "dense-small": {**_SMALL, "pattern": "*-", "tie_embeddings": True},
    "dense-medium": {**_MEDIUM, "pattern": "*-", "tie_embeddings": True},
    "dense-large": {**_LARGE, "pattern": "*-", "num_kv_heads": 4, "tie_embeddings": True},
    "dense-1b": {**_1B, "pattern": "*-", "ffn_hidden_size": 8192, "tie_embeddings": True},
    "dense-8b": {**_8B, "pattern": "*-", "ffn_hidden_size": 14336},
    "moe-tiny": {**_experts(_TINY, 2, 4, 2, 96), "qk_norm": False},
    "moe-small": _experts(_SMALL, 4, 32, 4, 512),
    "moe-medium": _experts(_MEDIUM, 4, 64, 8, 384),
    "moe-large": _experts(_LARGE, 4, 64, 8, 512),
    "moe-1b": _experts(_1B, 8, 64, 8, 1024),
    "moe-8b": _experts(_8B, 8, 64, 8, 1792),
    "mamba-tiny": {**_mamba(4, 64), "mamba2": {"head_dim": 16, "state_size": 16}},
    "mamba-small": _mamba(24, 768),
    "mamba-medium": _mamba(48, 1024),
    "mamba-large": _mamba(48, 1536),
    "mamba-1b": _mamba(48, 2048),
    "mamba-8b": _mamba(72, 4096),
    "hybrid-tiny": {
        **_hybrid(4, 64, 4, 2),
        "pattern": "2(M-)*-M-",
        "mamba2": {"head_dim": 16, "state_size": 16},
        "logits_scaling": 1.0,
    },
    "hybrid-small": _hybrid(10, 768, 12, 4),
    "hybrid-medium": _hybrid(20, 1024, 16, 4),
    "hybrid-large": _hybrid(20, 1536, 12, 4),
    "hybrid-1b": _hybrid(20, 2048, 16, 4),
    "hybrid-8b": _hybrid(30, 4096, 32, 8),
    "gpt-tiny": {"pattern": "*-", "num_layers": 4, "hidden_size": 256, "num_heads": 4, "ffn_hidden_size": 1024},
    "gpt-small": {"pattern": "*-", "num_layers": 12, "hidden_size": 768, "num_heads": 12, "ffn_hidden_size": 3072},
    "gpt-medium": {"pattern": "*-", "num_layers": 24, "hidden_size": 1024, "num_heads": 16, "ffn_hidden_size": 4096},
    # Experts in attention (Csordas et al. 2024), whose heads are few, and in the feed-forward (Fedus et al. 2022).
    "switch_all": {
        "pattern": "HE",
        "num_layers": 12,
        "hidden_size": 512,
        "num_heads": 2,
        "head_dim": 64,
        "tie_embeddings": True,
        "switch_head": {"num_experts": 5, "top_k": 3},
        "moe": {"num_experts": 16, "top_k": 1, "expert_hidden_size": 2048, "router": "switch", "capacity_factor": 1.25},
    },
}
