"""Public dense shapes: Llama 2 and 3, Qwen3, OLMo 2, Gemma, GPT-2, Bloom.

What makes each more than a Llama stands in its keys: QK-norm (Qwen3), norms of what the parts give and of all queries
together (OLMo 2), GeGLU, zero-centred norms and a scaled embedding (Gemma), LayerNorm, biases and learned positions
(GPT-2), a norm behind the embedding and ALiBi (Bloom).
"""

from collections.abc import Mapping
from typing import Any

Keys = Mapping[str, Any]

_LLAMA3: Keys = {"pattern": "*-", "vocab_size": 128256, "num_kv_heads": 8, "norm_eps": 1e-5, "rope_base": 500_000.0}
_QWEN3: Keys = {
    "pattern": "*-",
    "vocab_size": 151936,
    "num_kv_heads": 8,
    "head_dim": 128,
    "norm_eps": 1e-6,
    "rope_base": 1_000_000.0,
    "qk_norm": True,
}
_OLMO2: Keys = {
    "pattern": "*-",
    "vocab_size": 100352,
    "norm_placement": "branch",
    "norm_eps": 1e-6,
    "qk_norm": True,
    "qk_norm_over": "tokens",
    "rope_base": 500_000.0,
}
_GEMMA: Keys = {
    "pattern": "*-",
    "vocab_size": 256000,
    "head_dim": 256,
    "norm": "rmsnorm_zero_centred",
    "norm_eps": 1e-6,
    "ffn_activation": "geglu",
    "tie_embeddings": True,
}
_BLOOM: Keys = {
    "pattern": "*-",
    "vocab_size": 250880,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "embedding_norm": True,
    "position": "alibi",
    "ffn_activation": "gelu_tanh",
    "bias": ("q", "k", "v", "output", "ffn"),
    "tie_embeddings": True,
}
_GPT2: Keys = {
    "pattern": "*-",
    "vocab_size": 50257,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "position": "learned",
    "max_positions": 1024,
    "ffn_activation": "gelu_tanh",
    "bias": ("q", "k", "v", "output", "ffn"),
    "tie_embeddings": True,
}


def _shape(family: Keys, num_layers: int, hidden_size: int, num_heads: int, ffn_hidden_size: int, **more: Any) -> Keys:
    sizes = {"num_layers": num_layers, "hidden_size": hidden_size, "num_heads": num_heads}
    return {**family, **sizes, "ffn_hidden_size": ffn_hidden_size, **more}


def _stretched(factor: float) -> Keys:
    """Return Llama 3.1's and 3.2's way from samples of 8192 tokens to 131072."""
    return {"rope_scaling": {"kind": "llama3", "factor": factor, "original_length": 8192}}


DENSE: Mapping[str, Keys] = {
    # Llama 3.2 1B and 3B, 3 8B, 3.1 70B and 405B
    "llama3-1b": _shape(_LLAMA3, 16, 2048, 32, 8192, head_dim=64, tie_embeddings=True, **_stretched(32.0)),
    "llama3-3b": _shape(_LLAMA3, 28, 3072, 24, 8192, head_dim=128, tie_embeddings=True, **_stretched(32.0)),
    "llama3-8b": _shape(_LLAMA3, 32, 4096, 32, 14336),
    "llama3-70b": _shape(_LLAMA3, 80, 8192, 64, 28672, **_stretched(8.0)),
    "llama3-405b": _shape(_LLAMA3, 126, 16384, 128, 53248, **_stretched(8.0)),
    "llama2-70b": _shape({**_LLAMA3, "vocab_size": 32000, "rope_base": 10_000.0}, 80, 8192, 64, 28672),
    "qwen3-0.6b": _shape(_QWEN3, 28, 1024, 16, 3072, tie_embeddings=True),
    "qwen3-1.7b": _shape(_QWEN3, 28, 2048, 16, 6144, tie_embeddings=True),
    "qwen3-4b": _shape(_QWEN3, 36, 2560, 32, 9728, tie_embeddings=True),
    "qwen3-8b": _shape(_QWEN3, 36, 4096, 32, 12288),
    "olmo2-1b": _shape(_OLMO2, 16, 2048, 16, 8192),
    "olmo2-7b": _shape(_OLMO2, 32, 4096, 32, 11008),
    "gemma-2b": _shape(_GEMMA, 18, 2048, 8, 16384, num_kv_heads=1, embedding_multiplier=2048**0.5),
    "gemma-7b": _shape(_GEMMA, 28, 3072, 16, 24576, embedding_multiplier=3072**0.5),
    "gpt2": _shape(_GPT2, 12, 768, 12, 3072),
    "gpt2-medium": _shape(_GPT2, 24, 1024, 16, 4096),
    "gpt2-large": _shape(_GPT2, 36, 1280, 20, 5120),
    "gpt2-xl": _shape(_GPT2, 48, 1600, 25, 6400),
    "bloom-560m": _shape(_BLOOM, 24, 1024, 16, 4096),
    "bloom-7b1": _shape(_BLOOM, 30, 4096, 32, 16384),
}
