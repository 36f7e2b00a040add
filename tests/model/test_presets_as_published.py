"""Every number of a public preset is its publisher's: the published config.json, read by our import, is the same model.

What a preset means otherwise stands in OTHERWISE, with its reason. A number that no config.json names (a loss's weight,
a chunk's length) is held to its default, which the import leaves as it is.
"""

from collections.abc import Mapping
from typing import Any

import pytest
from public_configs import CONFIGS
from pydantic import BaseModel

from meshwright.model.config import ModelConfig
from meshwright.model.families.choose import config_from_foreign
from meshwright.model.presets import preset

# Where publishers wrote classes of their own, which we do not read: their config.json in our words, key by key.
IN_OUR_WORDS: Mapping[str, Mapping[str, Any]] = {
    "deepseek-moe-16b": {  # deepseek-ai/deepseek-moe-16b-base
        "pattern": "*E @0 *-",  # first_k_dense_replace = 1, moe_layer_freq = 1
        "num_layers": 28,  # num_hidden_layers
        "hidden_size": 2048,
        "num_heads": 16,  # num_attention_heads
        "num_kv_heads": 16,  # num_key_value_heads
        "ffn_hidden_size": 10944,  # intermediate_size
        "ffn_activation": "swiglu",  # hidden_act = "silu"
        "vocab_size": 102400,
        "norm_eps": 1e-6,  # rms_norm_eps
        "rope_base": 10_000.0,  # rope_theta
        "tie_embeddings": False,  # tie_word_embeddings
        "init_std": 0.02,  # initializer_range
        "moe": {
            "num_experts": 64,  # n_routed_experts
            "top_k": 6,  # num_experts_per_tok
            "expert_hidden_size": 1408,  # moe_intermediate_size
            "num_shared_experts": 2,  # n_shared_experts
            "router": "softmax",  # scoring_func
            "normalise_top_k": False,  # norm_topk_prob
            "load_balancing": "sequence",  # seq_aux = true
            "load_balancing_weight": 0.001,  # aux_loss_alpha
        },
    },
    "nemotron-h-8b": {  # nvidia/Nemotron-H-8B-Base-8K; 52 parts, of which 24 are an MLP behind a mixer
        "pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",  # hybrid_override_pattern
        "num_layers": 28,
        "hidden_size": 4096,
        "num_heads": 32,  # num_attention_heads
        "num_kv_heads": 8,  # num_key_value_heads
        "head_dim": 128,  # attention_head_dim
        "ffn_hidden_size": 21504,  # intermediate_size
        "ffn_activation": "relu2",  # mlp_hidden_act
        "vocab_size": 131072,
        "norm_eps": 1e-5,  # layer_norm_epsilon, rms_norm_eps
        "position": "none",  # its class has no positions
        "bias": (),  # attention_bias, mlp_bias = false
        "tie_embeddings": False,  # tie_word_embeddings
        "init_std": 0.02,  # initializer_range
        "mamba2": {
            "num_heads": 128,  # mamba_num_heads
            "head_dim": 64,  # mamba_head_dim
            "num_groups": 8,  # n_groups
            "state_size": 128,  # ssm_state_size
            "conv_kernel": 4,
            "bias": False,  # mamba_proj_bias, use_bias
            "conv_bias": True,  # use_conv_bias
            "time_step_low": 0.001,  # time_step_min
            "time_step_high": 0.1,  # time_step_max
        },
    },
}

# As is usual in pretraining now, where a run sees its tokens about once.
_NO_DROPOUT = {"embedding_dropout": 0.0, "residual_dropout": 0.0, "attention_dropout": 0.0}
# 0.1 is the transformers class's own; the code that trained the models (state-spaces/mamba) begins with 0.02.
_AS_TRAINED = {"init_std": 0.02}
# muP's 0.1 is divided by the root of width / 256 for the matrices inside, and not at the ends; we have one for both,
# and 0.1 / sqrt(4096 / 256) = 0.025 is near the usual one.
_WITHOUT_MUP = {"init_std": 0.02}
# Their loss is one of all layers, and top_k where the load is even: another loss has another weight.
_OUR_LOSS = {"moe.load_balancing_weight": 0.01}
OTHERWISE: Mapping[str, Mapping[str, Any]] = {
    "gpt2": _NO_DROPOUT,
    "gpt2-medium": _NO_DROPOUT,
    "gpt2-large": _NO_DROPOUT,
    "gpt2-xl": _NO_DROPOUT,
    "mamba-2.8b": _AS_TRAINED,
    "mamba2-2.7b": _AS_TRAINED,
    "granite4-h-micro": _WITHOUT_MUP,
    "granite4-h-tiny": _WITHOUT_MUP | _OUR_LOSS,
    "granite4-h-small": _WITHOUT_MUP | _OUR_LOSS,
    "mixtral-8x7b": _OUR_LOSS,
    "qwen3-30b-a3b": _OUR_LOSS,
    "qwen3-235b-a22b": _OUR_LOSS,
    "qwen3-next-80b-a3b": _OUR_LOSS,
    # As its report says of training (section 4.2); the file has the class's 0.02, and we read no loss from files.
    "deepseek-v3": {"init_std": 0.006, "moe.load_balancing": "sequence", "moe.load_balancing_weight": 0.0001},
}


def published(name: str) -> ModelConfig:
    """Return the model that the publisher's file names."""
    if name in IN_OUR_WORDS:
        return ModelConfig(**IN_OUR_WORDS[name])
    return config_from_foreign(CONFIGS[name])


def meant(config: ModelConfig) -> dict[str, Any]:
    """Return what a configuration means, by dotted key: the layers for their pattern, sizes for the 0 that they follow.

    Without MLPs nothing reads their width, which files name all the same.
    """
    h, found = config.hidden_size, dict[str, Any](layers=config.layers)
    for key in type(config).model_fields.keys() - {"preset", "pattern"}:
        value = getattr(config, key)
        found |= {f"{key}.{at}": it for at, it in value} if isinstance(value, BaseModel) else {key: value}
    if not config.has("mlp"):
        del found["ffn_hidden_size"]
    if config.mamba1:
        found |= {"mamba1.inner_size": config.mamba1.channels(h), "mamba1.dt_rank": config.mamba1.rank(h)}
    if config.mamba2:
        found["mamba2.num_heads"] = config.mamba2.heads(h)
    return found


@pytest.mark.parametrize("name", [*CONFIGS, *(IN_OUR_WORDS.keys() - CONFIGS.keys())])
def test_a_public_preset_is_the_published_model_in_every_key(name: str) -> None:
    ours, theirs = meant(preset(name)), meant(published(name))
    assert ours.keys() == theirs.keys()
    assert {key: value for key, value in ours.items() if value != theirs[key]} == OTHERWISE.get(name, {})
