"""Public shapes with a state: Mamba, Mamba-2, and the hybrids Granite 4.0 H and Nemotron-H.

A layer of Nemotron-H is one part; here a feed-forward belongs to the mixer before it, so that its 52 layers are 28.
"""

from collections.abc import Mapping
from typing import Any

Keys = Mapping[str, Any]

_GRANITE4: Keys = {
    "num_layers": 40,
    "vocab_size": 100352,
    "norm_eps": 1e-5,
    "position": "none",
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "tie_embeddings": True,
}
_AT = "@5,15,25,35"


def _granite(hidden_size: int, num_heads: int, num_kv_heads: int, **more: Any) -> Keys:
    """Return Granite's keys: scores by 1 / head_dim, logits by 256 / width."""
    scales = {"attention_scale": num_heads / hidden_size, "logits_scaling": hidden_size / 256}
    sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    return {**_GRANITE4, **sizes, **scales, **more}


def _experts(num_experts: int, top_k: int, expert_hidden_size: int) -> Keys:
    """Return experts of so many, for a token, so wide; two shared ones beside them."""
    sizes = {"num_experts": num_experts, "top_k": top_k, "expert_hidden_size": expert_hidden_size}
    return {**sizes, "num_shared_experts": 2}


STATE: Mapping[str, Keys] = {
    "mamba-2.8b": {
        "pattern": "m",
        "num_layers": 64,
        "hidden_size": 2560,
        "vocab_size": 50280,
        "norm_eps": 1e-5,
        "tie_embeddings": True,
    },
    "mamba2-2.7b": {
        "pattern": "M",
        "num_layers": 64,
        "hidden_size": 2560,
        "vocab_size": 50288,
        "norm_eps": 1e-5,
        "tie_embeddings": True,
    },
    "granite4-h-micro": _granite(2048, 32, 8, pattern=f"M- {_AT} *-", ffn_hidden_size=8192),
    "granite4-h-tiny": _granite(1536, 12, 4, pattern=f"ME {_AT} *E", moe=_experts(64, 6, 512)),
    "granite4-h-small": _granite(4096, 32, 8, pattern=f"ME {_AT} *E", moe=_experts(72, 10, 768)),
    "nemotron-h-8b": {
        "pattern": "3(M-)M*-4(M-)M*-4(M-)M*-4(M-)M*-5(M-)",
        "num_layers": 28,
        "hidden_size": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "ffn_hidden_size": 21504,
        "ffn_activation": "relu2",
        "vocab_size": 131072,
        "norm_eps": 1e-5,
        "position": "none",
        "mamba2": {"num_heads": 128, "head_dim": 64, "num_groups": 8, "state_size": 128},
    },
}
