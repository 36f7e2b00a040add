"""The published config.json of each public preset, written from the publishers' files: not made from ours.

A wrong number here and there would else agree with itself. Kept is what says which model it is; left out are the ids of
tokens, types, caches, versions, and the weights of losses, which no class computes with. What a publisher's file takes
from its class (GPT-2's tie, Gemma's) is left to the class here too.
"""

from typing import Any

Keys = dict[str, Any]


def sizes(layers: int, hidden: int, heads: int, inner: int, **more: Any) -> Keys:
    """Return the four sizes under the names that most classes have."""
    named = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    return {**named, "intermediate_size": inner, **more}


PLAIN: Keys = {"hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "rope_scaling": None}

# meta-llama/Meta-Llama-3-8B, Llama-3.1-70B, Llama-3.1-405B, Llama-3.2-1B, Llama-3.2-3B, Llama-2-70b-hf
LLAMA3: Keys = {
    **PLAIN,
    "model_type": "llama",
    "attention_bias": False,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA2: Keys = {**LLAMA3, "max_position_embeddings": 4096, "rope_theta": 10000.0, "vocab_size": 32000}


def stretched(factor: float) -> Keys:
    """Return what Llama 3.1 and 3.2 say of longer samples."""
    scaling: Keys = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
    return {"max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": scaling}


# Qwen/Qwen3-0.6B, -1.7B, -4B, -8B; Qwen/Qwen3-30B-A3B, -235B-A22B
QWEN3: Keys = {
    **PLAIN,
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_MOE: Keys = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
}

# allenai/OLMo-2-0425-1B, OLMo-2-1124-7B; allenai/OLMoE-1B-7B-0924
OLMO2: Keys = {
    **PLAIN,
    "model_type": "olmo2",
    "attention_bias": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}
OLMOE: Keys = {
    **OLMO2,
    "model_type": "olmoe",
    "clip_qkv": None,
    "norm_topk_prob": False,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 50304,
}

# google/gemma-2b, gemma-7b
GEMMA: Keys = {
    **PLAIN,
    "model_type": "gemma",
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}

# openai-community/gpt2, gpt2-medium, gpt2-large, gpt2-xl
GPT2: Keys = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "vocab_size": 50257,
}

# bigscience/bloom-560m, bloom-7b1
BLOOM: Keys = {
    "model_type": "bloom",
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "vocab_size": 250880,
}

# mistralai/Mixtral-8x7B-v0.1
MIXTRAL: Keys = {
    **PLAIN,
    "model_type": "mixtral",
    "max_position_embeddings": 32768,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}

# deepseek-ai/DeepSeek-V3-Base
DEEPSEEK_V3: Keys = {
    **PLAIN,
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 128,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}

# Qwen/Qwen3-Next-80B-A3B-Instruct
QWEN3_NEXT: Keys = {
    **PLAIN,
    "model_type": "qwen3_next",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}

# state-spaces/mamba-2.8b-hf; state-spaces/mamba2-2.7b as converted to transformers' class
MAMBA: Keys = {
    "model_type": "mamba",
    "conv_kernel": 4,
    "expand": 2,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.1,
    "intermediate_size": 5120,
    "layer_norm_epsilon": 1e-5,
    "num_hidden_layers": 64,
    "residual_in_fp32": True,
    "state_size": 16,
    "time_step_rank": 160,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 50280,
}
MAMBA2: Keys = {
    "model_type": "mamba2",
    "chunk_size": 256,
    "conv_kernel": 4,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.1,
    "layer_norm_epsilon": 1e-5,
    "n_groups": 1,
    "num_heads": 80,
    "num_hidden_layers": 64,
    "residual_in_fp32": True,
    "state_size": 128,
    "tie_word_embeddings": True,
    "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 50288,
}

# ibm-granite/granite-4.0-h-micro-base, -tiny-base, -small-base
GRANITE4: Keys = {
    **PLAIN,
    "model_type": "granitemoehybrid",
    "attention_bias": False,
    "embedding_multiplier": 12,
    "initializer_range": 0.1,
    "layer_types": ["attention" if at in (5, 15, 25, 35) else "mamba" for at in range(40)],
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "max_position_embeddings": 131072,
    "normalization_function": "rmsnorm",
    "position_embedding_type": "nope",
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "vocab_size": 100352,
}


def granite4(hidden: int, heads: int, kv_heads: int, mamba_heads: int, *, score: float, logits: int) -> Keys:
    """Return the keys of mixers and of muP that Granite's sizes differ by."""
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "mamba_n_heads": mamba_heads}
    scales = {"attention_multiplier": score, "logits_scaling": logits}
    return GRANITE4 | heads_of | scales | {"hidden_size": hidden, "num_hidden_layers": 40}


def granite4_experts(experts: int, top_k: int, inner: int, shared: int) -> Keys:
    """Return the keys of feed-forwards."""
    widths = {"intermediate_size": inner, "shared_intermediate_size": shared}
    return {"num_local_experts": experts, "num_experts_per_tok": top_k, **widths}


# nvidia/Nemotron-H-8B-Base-8K; the pattern is its `hybrid_override_pattern`
NEMOTRON_H_PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
NEMOTRON_H: Keys = {
    "model_type": "nemotron_h",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "conv_kernel": 4,
    "head_dim": 128,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 21504,
    "layer_norm_epsilon": 1e-5,
    "layers_block_type": [{"M": "mamba", "*": "attention", "-": "mlp"}[letter] for letter in NEMOTRON_H_PATTERN],
    "mamba_head_dim": 64,
    "mamba_num_heads": 128,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_groups": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 131072,
}

CONFIGS: dict[str, Keys] = {
    "llama3-1b": LLAMA3 | stretched(32.0) | sizes(16, 2048, 32, 8192, head_dim=64, tie_word_embeddings=True),
    "llama3-3b": LLAMA3 | stretched(32.0) | sizes(28, 3072, 24, 8192, head_dim=128, tie_word_embeddings=True),
    "llama3-8b": LLAMA3 | sizes(32, 4096, 32, 14336),
    "llama3-70b": LLAMA3 | stretched(8.0) | sizes(80, 8192, 64, 28672),
    "llama3-405b": LLAMA3 | stretched(8.0) | sizes(126, 16384, 128, 53248),
    "llama2-70b": LLAMA2 | sizes(80, 8192, 64, 28672),
    "qwen3-0.6b": QWEN3 | sizes(28, 1024, 16, 3072, tie_word_embeddings=True),
    "qwen3-1.7b": QWEN3 | sizes(28, 2048, 16, 6144, tie_word_embeddings=True),
    "qwen3-4b": QWEN3 | sizes(36, 2560, 32, 9728, tie_word_embeddings=True),
    "qwen3-8b": QWEN3 | sizes(36, 4096, 32, 12288),
    "olmo2-1b": OLMO2 | sizes(16, 2048, 16, 8192, num_key_value_heads=16),
    "olmo2-7b": OLMO2 | sizes(32, 4096, 32, 11008, num_key_value_heads=32),
    "gemma-2b": GEMMA | sizes(18, 2048, 8, 16384, num_key_value_heads=1),
    "gemma-7b": GEMMA | sizes(28, 3072, 16, 24576, num_key_value_heads=16),
    "gpt2": GPT2 | {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "gpt2-medium": GPT2 | {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "gpt2-large": GPT2 | {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "gpt2-xl": GPT2 | {"n_layer": 48, "n_embd": 1600, "n_head": 25},
    "bloom-560m": BLOOM | {"n_layer": 24, "hidden_size": 1024, "n_head": 16},
    "bloom-7b1": BLOOM | {"n_layer": 30, "hidden_size": 4096, "n_head": 32},
    "mixtral-8x7b": MIXTRAL | sizes(32, 4096, 32, 14336),
    "qwen3-30b-a3b": QWEN3_MOE | sizes(48, 2048, 32, 6144, moe_intermediate_size=768),
    "qwen3-235b-a22b": QWEN3_MOE | sizes(94, 4096, 64, 12288, moe_intermediate_size=1536),
    "olmoe-1b-7b": OLMOE | sizes(16, 2048, 16, 1024),
    "deepseek-v3": DEEPSEEK_V3 | sizes(61, 7168, 128, 18432),
    "qwen3-next-80b-a3b": QWEN3_NEXT | sizes(48, 2048, 16, 5120),
    "mamba-2.8b": MAMBA,
    "mamba2-2.7b": MAMBA2,
    "granite4-h-micro": granite4(2048, 32, 8, 64, score=0.015625, logits=8) | granite4_experts(0, 0, 8192, 8192),
    "granite4-h-tiny": granite4(1536, 12, 4, 48, score=0.0078125, logits=6) | granite4_experts(64, 6, 512, 1024),
    "granite4-h-small": granite4(4096, 32, 8, 128, score=0.0078125, logits=16) | granite4_experts(72, 10, 768, 1536),
    "nemotron-h-8b": NEMOTRON_H,
}
