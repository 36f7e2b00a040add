"""Presets have the published shapes: parameter counts are those of transformers' own classes, built without memory."""

from typing import Any

import pytest
import torch

from meshwright.model.config import ModelConfig
from meshwright.model.costs import active_parameter_count, parameter_count
from meshwright.model.presets import PRESETS, preset, with_preset

# As published with the weights.
PUBLISHED = {
    "llama3-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama2-70b": 68_976_648_192,
    "llama3-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}


def transformers_count(config: ModelConfig) -> int:
    """Build the same model from transformers' classes on the meta device and count its weights."""
    transformers = pytest.importorskip("transformers")
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if config.moe is None:
        built = transformers.LlamaConfig(**shape)
    elif config.qk_norm:
        experts = {"num_experts": config.moe.num_experts, "moe_intermediate_size": config.moe.expert_hidden_size}
        built = transformers.Qwen3MoeConfig(**shape, **experts)
    else:
        shape |= {"intermediate_size": config.moe.expert_hidden_size, "num_local_experts": config.moe.num_experts}
        built = transformers.MixtralConfig(**shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(built)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_public_shape_has_its_published_number_of_weights(name: str) -> None:
    assert parameter_count(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", [*PUBLISHED, "tiny", "moe-tiny", "moe-small"])
def test_transformers_counts_the_same_weights(name: str) -> None:
    config = preset(name) if preset(name).vocab_size else preset(name, vocab_size=320)
    if name == "moe-tiny":
        config = config.model_copy(update={"qk_norm": True})
    assert parameter_count(config) == transformers_count(config)


def test_a_token_meets_a_tenth_of_qwen3s_experts() -> None:
    assert active_parameter_count(preset("qwen3-30b-a3b")) == pytest.approx(3.3e9, rel=0.02)
    assert active_parameter_count(preset("mixtral-8x7b")) == pytest.approx(12.9e9, rel=0.01)
    assert active_parameter_count(preset("llama3-8b")) == PUBLISHED["llama3-8b"]


@pytest.mark.parametrize(
    ("name", "width", "layers", "heads", "feedforward"),
    [("gpt-tiny", 256, 4, 4, 1024), ("gpt-small", 768, 12, 12, 3072), ("gpt-medium", 1024, 24, 16, 4096)],
)
def test_the_small_gpts_have_their_shapes(name: str, width: int, layers: int, heads: int, feedforward: int) -> None:
    config = preset(name)
    sizes = (config.hidden_size, config.num_layers, config.num_heads, config.ffn_hidden_size)
    assert sizes == (width, layers, heads, feedforward)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_model(name: str) -> None:
    assert preset(name).problems() == []


def test_changes_win_also_within_the_experts() -> None:
    config = preset("moe-tiny", vocab_size=512, moe={"top_k": 1})
    assert config.moe is not None
    assert (config.vocab_size, config.moe.top_k, config.moe.num_experts) == (512, 1, 4)


def test_sizes_that_follow_from_a_changed_one_follow() -> None:
    assert preset("tiny", hidden_size=128).head_dim == 32


def test_a_preset_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="no such preset; the presets are: tiny, small"):
        with_preset({"preset": "llama9"})


def test_a_change_that_makes_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.num_kv_heads = 3: must divide model.num_heads = 4"):
        preset("tiny", num_kv_heads=3)
