"""The published config of each public preset, as transformers' classes take it: written from the publishers' files.

Not made from ours: a wrong size here and there would else agree with itself.
"""

from typing import Any

LLAMA3: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8}
QWEN3: dict[str, Any] = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}


def sizes(layers: int, hidden: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    """Return the four sizes under the names that most classes have."""
    named = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    return {**named, "intermediate_size": inner, **more}


def granite(hidden: int, heads: int, kv_heads: int, inner: int, shared: int, experts: int, top_k: int) -> Any:
    """Return Granite 4.0 H: 40 layers, attention in four of them."""
    return "GraniteMoeHybridConfig", sizes(
        40,
        hidden,
        heads,
        inner,
        num_key_value_heads=kv_heads,
        vocab_size=100352,
        layer_types=["attention" if at in (5, 15, 25, 35) else "mamba" for at in range(40)],
        mamba_n_heads=2 * hidden // 64,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_n_groups=1,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_conv_bias=True,
        mamba_proj_bias=False,
        shared_intermediate_size=shared,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        tie_word_embeddings=True,
    )


NEMOTRON_H = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-1b": ("LlamaConfig", sizes(16, 2048, 32, 8192, head_dim=64, tie_word_embeddings=True, **LLAMA3)),
    "llama3-3b": ("LlamaConfig", sizes(28, 3072, 24, 8192, head_dim=128, tie_word_embeddings=True, **LLAMA3)),
    "llama3-8b": ("LlamaConfig", sizes(32, 4096, 32, 14336, **LLAMA3)),
    "llama3-70b": ("LlamaConfig", sizes(80, 8192, 64, 28672, **LLAMA3)),
    "llama3-405b": ("LlamaConfig", sizes(126, 16384, 128, 53248, **LLAMA3)),
    "llama2-70b": ("LlamaConfig", sizes(80, 8192, 64, 28672, vocab_size=32000, num_key_value_heads=8)),
    "qwen3-0.6b": ("Qwen3Config", sizes(28, 1024, 16, 3072, tie_word_embeddings=True, **QWEN3)),
    "qwen3-1.7b": ("Qwen3Config", sizes(28, 2048, 16, 6144, tie_word_embeddings=True, **QWEN3)),
    "qwen3-4b": ("Qwen3Config", sizes(36, 2560, 32, 9728, tie_word_embeddings=True, **QWEN3)),
    "qwen3-8b": ("Qwen3Config", sizes(36, 4096, 32, 12288, tie_word_embeddings=False, **QWEN3)),
    "olmo2-1b": ("Olmo2Config", sizes(16, 2048, 16, 8192, vocab_size=100352, tie_word_embeddings=False)),
    "olmo2-7b": ("Olmo2Config", sizes(32, 4096, 32, 11008, vocab_size=100352, tie_word_embeddings=False)),
    "gemma-2b": ("GemmaConfig", sizes(18, 2048, 8, 16384, vocab_size=256000, head_dim=256, num_key_value_heads=1)),
    "gemma-7b": ("GemmaConfig", sizes(28, 3072, 16, 24576, vocab_size=256000, head_dim=256, num_key_value_heads=16)),
    "gpt2": ("GPT2Config", {"n_layer": 12, "n_embd": 768, "n_head": 12}),
    "gpt2-medium": ("GPT2Config", {"n_layer": 24, "n_embd": 1024, "n_head": 16}),
    "gpt2-large": ("GPT2Config", {"n_layer": 36, "n_embd": 1280, "n_head": 20}),
    "gpt2-xl": ("GPT2Config", {"n_layer": 48, "n_embd": 1600, "n_head": 25}),
    "bloom-560m": ("BloomConfig", {"n_layer": 24, "hidden_size": 1024, "n_head": 16, "vocab_size": 250880}),
    "bloom-7b1": ("BloomConfig", {"n_layer": 30, "hidden_size": 4096, "n_head": 32, "vocab_size": 250880}),
    "mixtral-8x7b": (
        "MixtralConfig",
        sizes(32, 4096, 32, 14336, num_key_value_heads=8, vocab_size=32000, num_local_experts=8),
    ),
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        sizes(48, 2048, 32, 6144, num_experts=128, moe_intermediate_size=768, **QWEN3 | {"num_key_value_heads": 4}),
    ),
    "qwen3-235b-a22b": (
        "Qwen3MoeConfig",
        sizes(94, 4096, 64, 12288, num_experts=128, moe_intermediate_size=1536, **QWEN3 | {"num_key_value_heads": 4}),
    ),
    "olmoe-1b-7b": ("OlmoeConfig", sizes(16, 2048, 16, 1024, vocab_size=50304, num_experts=64)),
    "deepseek-v3": (
        "DeepseekV3Config",
        sizes(
            61,
            7168,
            128,
            18432,
            vocab_size=129280,
            num_key_value_heads=128,
            moe_intermediate_size=2048,
            n_routed_experts=256,
            n_shared_experts=1,
            first_k_dense_replace=3,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
        ),
    ),
    "qwen3-next-80b-a3b": (
        "Qwen3NextConfig",
        sizes(
            48,
            2048,
            16,
            5120,
            vocab_size=151936,
            num_key_value_heads=2,
            head_dim=256,
            linear_num_value_heads=32,
            linear_num_key_heads=16,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_conv_kernel_dim=4,
            num_experts=512,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
        ),
    ),
    "mamba-2.8b": (
        "MambaConfig",
        {"hidden_size": 2560, "num_hidden_layers": 64, "vocab_size": 50280, "state_size": 16, "time_step_rank": 160},
    ),
    "mamba2-2.7b": (
        "Mamba2Config",
        {
            "hidden_size": 2560,
            "num_hidden_layers": 64,
            "vocab_size": 50288,
            "num_heads": 80,
            "head_dim": 64,
            "n_groups": 1,
            "state_size": 128,
            "tie_word_embeddings": True,
        },
    ),
    "granite4-h-micro": granite(2048, 32, 8, 8192, 8192, 0, 0),
    "granite4-h-tiny": granite(1536, 12, 4, 512, 1024, 64, 6),
    "granite4-h-small": granite(4096, 32, 8, 768, 1536, 72, 10),
    "nemotron-h-8b": (
        "NemotronHConfig",
        {
            "hidden_size": 4096,
            "layers_block_type": [{"M": "mamba", "*": "attention", "-": "mlp"}[letter] for letter in NEMOTRON_H],
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 21504,
            "vocab_size": 131072,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "n_groups": 8,
            "ssm_state_size": 128,
        },
    ),
}
