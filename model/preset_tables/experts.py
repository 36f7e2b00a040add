"""Public shapes with experts: Mixtral, Qwen3, OLMoE, DeepSeekMoE, DeepSeek-V3, Qwen3-Next.

DeepSeek-V3 is here as it generates; in training it also predicts one further token, by a layer more:
`preset("deepseek-v3", multi_token={"depth": 1})`. Its bias keeps the load even, beside a small loss.
"""

from collections.abc import Mapping
from typing import Any

Keys = Mapping[str, Any]

_QWEN3: Keys = {
    "pattern": "*E",
    "vocab_size": 151936,
    "num_kv_heads": 4,
    "head_dim": 128,
    "norm_eps": 1e-6,
    "rope_base": 1_000_000.0,
    "qk_norm": True,
}

EXPERTS: Mapping[str, Keys] = {
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
        **_QWEN3,
        "num_layers": 48,
        "hidden_size": 2048,
        "num_heads": 32,
        "moe": {"num_experts": 128, "top_k": 8, "expert_hidden_size": 768},
    },
    "qwen3-235b-a22b": {
        **_QWEN3,
        "num_layers": 94,
        "hidden_size": 4096,
        "num_heads": 64,
        "moe": {"num_experts": 128, "top_k": 8, "expert_hidden_size": 1536},
    },
    "olmoe-1b-7b": {
        "pattern": "*E",
        "num_layers": 16,
        "hidden_size": 2048,
        "num_heads": 16,
        "vocab_size": 50304,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "qk_norm_over": "tokens",
        "moe": {"num_experts": 64, "top_k": 8, "expert_hidden_size": 1024, "normalise_top_k": False},
    },
    "deepseek-moe-16b": {
        "pattern": "*E @0 *-",
        "num_layers": 28,
        "hidden_size": 2048,
        "num_heads": 16,
        "ffn_hidden_size": 10944,
        "vocab_size": 102400,
        "norm_eps": 1e-6,
        "moe": {
            "num_experts": 64,
            "top_k": 6,
            "expert_hidden_size": 1408,
            "num_shared_experts": 2,
            "normalise_top_k": False,
            "load_balancing_weight": 0.001,
        },
    },
    "deepseek-v3": {
        "pattern": "+E @0-2 +-",
        "num_layers": 61,
        "hidden_size": 7168,
        "num_heads": 128,
        "ffn_hidden_size": 18432,
        "vocab_size": 129280,
        "norm_eps": 1e-6,
        "rope_scaling": {
            "kind": "yarn",
            "factor": 40.0,
            "original_length": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "init_std": 0.006,
        "latent": {
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        "moe": {
            "num_experts": 256,
            "top_k": 8,
            "expert_hidden_size": 2048,
            "num_shared_experts": 1,
            "router": "sigmoid",
            "weight_scale": 2.5,
            "num_groups": 8,
            "top_groups": 4,
            "load_balancing": "sequence",
            "load_balancing_weight": 0.0001,
        },
    },
    "qwen3-next-80b-a3b": {
        "pattern": "3(GE)*E",
        "num_layers": 48,
        "hidden_size": 2048,
        "num_heads": 16,
        "num_kv_heads": 2,
        "head_dim": 256,
        "vocab_size": 151936,
        "norm": "rmsnorm_zero_centred",
        "norm_eps": 1e-6,
        "qk_norm": True,
        "attention_gate": True,
        "rope_base": 10_000_000.0,
        "rope_fraction": 0.25,
        "gated_delta": {"num_heads": 32, "num_key_heads": 16, "key_head_dim": 128, "value_head_dim": 128},
        "moe": {
            "num_experts": 512,
            "top_k": 10,
            "expert_hidden_size": 512,
            "num_shared_experts": 1,
            "shared_expert_gate": True,
        },
    },
}
