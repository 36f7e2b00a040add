"""Presets have the published shapes: parameter counts are those of transformers' own classes, built without memory."""

import pytest
import torch
from public_configs import CONFIGS

from meshwright.model.counts.costs import active_parameter_count, parameter_count
from meshwright.model.presets import PRESETS, preset, with_preset

# As published with the weights (the index of the weights' file, or its metadata).
PUBLISHED = {
    "llama3-1b": 1_235_814_400,
    "llama3-3b": 3_212_749_824,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama2-70b": 68_976_648_192,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "bloom-560m": 559_214_592,
    "bloom-7b1": 7_069_016_064,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "olmoe-1b-7b": 6_919_161_856,
    "deepseek-moe-16b": 16_375_728_128,  # by a class of its own, which transformers does not have
}
# Where only a rounded number is published: it, and half of its last digit.
ROUNDED = {
    "deepseek-v3": (671e9, 0.5e9),
    "qwen3-next-80b-a3b": (80e9, 0.5e9),
    "mamba-2.8b": (2.8e9, 0.05e9),
    "mamba2-2.7b": (2.7e9, 0.05e9),
    "granite4-h-micro": (3e9, 0.5e9),
    "granite4-h-tiny": (7e9, 0.5e9),
    "granite4-h-small": (32e9, 0.5e9),
    "nemotron-h-8b": (8e9, 0.5e9),
}
ACTIVE = {
    "mixtral-8x7b": (12.9e9, 0.05e9),
    "qwen3-30b-a3b": (3.3e9, 0.06e9),
    "qwen3-235b-a22b": (22e9, 0.5e9),
    "olmoe-1b-7b": (1.3e9, 0.05e9),
    "deepseek-moe-16b": (2.8e9, 0.05e9),
    "deepseek-v3": (37e9, 0.6e9),  # 37 B; 37.6 B with the embedding, of which a token meets one row
    "granite4-h-small": (9e9, 0.5e9),
}
SIZES = ("tiny", "small", "medium", "large", "1b", "8b")
LIMITS = {"tiny": (0.1e6, 0.6e6), "small": (75e6, 95e6), "medium": (290e6, 350e6), "large": (600e6, 750e6)} | {
    "1b": (0.95e9, 1.3e9),
    "8b": (6.5e9, 8e9),
}
"""Weights that a token meets in the layers."""


def transformers_count(name: str) -> int:
    """Build the published config with transformers' class on the meta device and count its weights."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**CONFIGS[name]))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_public_shape_has_its_published_number_of_weights(name: str) -> None:
    assert parameter_count(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_a_public_shape_is_as_large_as_its_publishers_say(name: str) -> None:
    number, half_a_digit = ROUNDED[name]
    assert abs(parameter_count(preset(name)) - number) <= half_a_digit


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_meets_as_many_weights_as_its_publishers_say(name: str) -> None:
    number, half_a_digit = ACTIVE[name]
    assert abs(active_parameter_count(preset(name)) - number) <= half_a_digit


# The others are the same classes with other sizes, and slow to build.
QUICK = ("llama3-1b", "olmo2-1b", "gemma-2b", "bloom-560m", "granite4-h-micro")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS]
)
def test_transformers_counts_the_same_weights(name: str) -> None:
    assert parameter_count(preset(name)) == transformers_count(name)


def test_every_public_preset_is_held_to_a_published_number() -> None:
    ours = {f"{kind}-{size}" for kind in ("dense", "moe", "mamba", "hybrid") for size in SIZES}
    ours |= {"gpt-tiny", "gpt-small", "gpt-medium", "switch_all"}
    assert set(PRESETS) == ours | set(PUBLISHED) | set(ROUNDED)
    assert set(PRESETS) - ours - {"deepseek-moe-16b"} == set(CONFIGS)


@pytest.mark.parametrize("kind", ["dense", "moe", "mamba", "hybrid"])
@pytest.mark.parametrize("size", SIZES)
def test_a_token_meets_about_as_many_weights_in_each_architecture(kind: str, size: str) -> None:
    config = preset(f"{kind}-{size}", vocab_size=64)
    low, high = LIMITS[size]
    assert low < active_parameter_count(config) < high


def test_the_next_token_but_one_costs_deepseek_v3_another_11_5_billion_weights() -> None:
    further = preset("deepseek-v3", multi_token={"depth": 1})
    more = parameter_count(further) - parameter_count(preset("deepseek-v3"))
    assert more == pytest.approx(11.5e9, rel=0.01)


def test_the_hybrids_are_granites_blocks() -> None:
    for name in (name for name in PRESETS if name.startswith(("hybrid-", "granite4-h-"))):
        config = preset(name)
        assert config.mamba2 is not None
        heads = config.mamba2.heads(config.hidden_size)
        assert (config.mamba2.num_groups, heads * config.mamba2.head_dim) == (1, 2 * config.hidden_size)
        assert (config.mamba2.conv_bias, config.mamba2.bias, config.position) == (True, False, "none")
        assert config.attention_scale == 1 / config.head_dim
        assert (config.embedding_multiplier, config.residual_multiplier) == (12.0, 0.22)
        assert all(layer.feedforward for layer in config.layers)
    at = [at for at, layer in enumerate(preset("granite4-h-tiny").layers) if layer.mixer == "attention"]
    assert at == [5, 15, 25, 35]


def test_nemotron_h_has_its_52_parts_in_order() -> None:
    letters = {"mamba2": "M", "attention": "*", "mlp": "-"}
    parts = "".join(letters[name] for layer in preset("nemotron-h-8b").layers for name in layer.names)
    assert parts == "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-"


@pytest.mark.parametrize(
    ("name", "width", "layers", "heads", "feedforward"),
    [("gpt-tiny", 256, 4, 4, 1024), ("gpt-small", 768, 12, 12, 3072), ("gpt-medium", 1024, 24, 16, 4096)],
)
def test_the_small_gpts_have_their_shapes(name: str, width: int, layers: int, heads: int, feedforward: int) -> None:
    config = preset(name)
    sizes = (config.hidden_size, config.num_layers, config.num_heads, config.ffn_hidden_size)
    assert sizes == (width, layers, heads, feedforward)


def test_switch_all_has_experts_in_attention_and_feed_forward() -> None:
    config = preset("switch_all")
    assert config.moe is not None
    assert {kind.name for kind in config.part_kinds} == {"switch_head", "moe"}
    assert (config.moe.router, config.moe.top_k, config.moe.capacity_factor) == ("switch", 1, 1.25)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_model(name: str) -> None:
    assert preset(name).problems() == []
    # What nothing read would be left out without a word, such as the weight of a loss that there is not.
    assert with_preset({"preset": name}) == {**PRESETS[name], "preset": name}


def test_deepseek_v3_has_its_published_loss_beside_the_bias() -> None:
    moe = preset("deepseek-v3").moe
    assert moe is not None
    assert (moe.load_balancing, moe.load_balancing_weight, moe.bias_rate) == ("sequence", 0.0001, 0.001)


def test_changes_win_also_within_the_tables_of_parts() -> None:
    config = preset("moe-tiny", vocab_size=512, moe={"top_k": 1})
    assert config.moe is not None
    assert (config.vocab_size, config.moe.top_k, config.moe.num_experts) == (512, 1, 4)
    latent = preset("deepseek-v3", latent={"kv_lora_rank": 256}).latent
    assert latent is not None
    assert (latent.kv_lora_rank, latent.q_lora_rank) == (256, 1536)


def test_sizes_that_follow_from_a_changed_one_follow() -> None:
    assert preset("dense-tiny", hidden_size=128).head_dim == 32


def test_a_preset_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="no such preset; the presets are: dense-tiny, dense-small"):
        with_preset({"preset": "llama9"})


def test_a_change_that_makes_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.num_kv_heads = 3: must divide model.num_heads = 4"):
        preset("dense-tiny", num_kv_heads=3)
