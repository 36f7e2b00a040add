"""Each configuration goes to the class that is exactly it; what none can be is refused by key, with a way out."""

from math import prod
from typing import Any

import pytest

from meshwright.model.config import ModelConfig
from meshwright.model.counts.costs import parameter_count
from meshwright.model.counts.shapes import parameter_shapes
from meshwright.model.families.choose import (
    FAMILIES,
    ForeignConfigError,
    NotRepresentableError,
    choose_family,
    config_from_foreign,
)
from meshwright.model.families.family import Family
from meshwright.model.families.foreign_keys import KINDS
from meshwright.model.kinds.feedforward.moe import MoeConfig
from meshwright.model.presets import PRESETS, preset

MOE = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 16}
DEEPSEEK: dict[str, object] = {"router": "sigmoid", "num_shared_experts": 1}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}


def config(moe: dict[str, object] | None = None, **changes: object) -> ModelConfig:
    sizes: dict[str, object] = {"num_layers": 4, "hidden_size": 16, "num_heads": 2, "vocab_size": 64}
    if moe is not None:
        sizes["moe"] = MoeConfig(**(MOE | moe))  # type: ignore[arg-type]
    return ModelConfig(**(sizes | changes))  # type: ignore[arg-type]


def reasons(ours: ModelConfig) -> list[str]:
    with pytest.raises(NotRepresentableError) as refused:
        choose_family(ours)
    return refused.value.reasons


@pytest.mark.parametrize(
    ("ours", "class_name"),
    [
        (config(), "LlamaForCausalLM"),
        (config(qk_norm=True), "Qwen3ForCausalLM"),
        (config({}, pattern="*E"), "MixtralForCausalLM"),
        (config({}, pattern="*E", qk_norm=True), "Qwen3MoeForCausalLM"),
        (config({"num_shared_experts": 1}, pattern="*E"), "GraniteMoeHybridForCausalLM"),
        (config(position="none"), "GraniteMoeHybridForCausalLM"),
        (config({}, pattern="*-*E", qk_norm=True), "Qwen3MoeForCausalLM"),
        (config(num_heads=3, head_dim=8, qk_norm=True), "Qwen3ForCausalLM"),
    ],
)
def test_a_config_goes_to_its_class(ours: ModelConfig, class_name: str) -> None:
    assert choose_family(ours).class_name == class_name


@pytest.mark.parametrize(("top_k", "fits"), [(2, False), (4, True)])
def test_un_normalised_weights_are_mixtrals_only_where_they_sum_to_one(top_k: int, fits: bool) -> None:
    ours = config({"normalise_top_k": False, "top_k": top_k}, pattern="*E")
    if fits:
        assert choose_family(ours).class_name == "MixtralForCausalLM"
    else:
        (reason,) = reasons(ours)
        assert reason.startswith("model.moe.normalise_top_k = false")
        assert "Qwen3Moe and OLMoE (both with qk_norm = true) take both" in reason


def test_un_normalised_weights_are_a_flag_of_qwen3_moe() -> None:
    ours = config({"normalise_top_k": False}, pattern="*E", qk_norm=True)
    assert choose_family(ours).to_foreign(ours)["norm_topk_prob"] is False


NO_CLASS = ("switch_all", "deepseek-moe-16b", "nemotron-h-8b")  # of transformers


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in NO_CLASS])
def test_a_preset_has_a_class_whose_tensors_hold_its_weights(name: str) -> None:
    ours = preset(name).with_vocab(1000)
    family = choose_family(ours)
    weights = parameter_shapes(ours)
    rows = [row for row in family.mapping(ours) if row.sources[0].ours in weights]  # others are routers' biases
    assert sum(prod(row.shape) for row in rows) == parameter_count(ours)
    public = {"llama3-8b": "llama", "llama2-70b": "llama", "mixtral-8x7b": "mixtral", "qwen3-30b-a3b": "qwen3_moe"}
    assert family.model_type == public.get(name, family.model_type)


def test_dense_layers_between_experts_are_listed() -> None:
    ours = config({}, pattern="*-*E", qk_norm=True)
    assert choose_family(ours).to_foreign(ours)["mlp_only_layers"] == [0, 2]


@pytest.mark.parametrize(
    ("ours", "beginning", "way_out"),
    [
        (
            config({"num_shared_experts": 2}, pattern="*E", qk_norm=True),
            "model.moe.num_shared_experts = 2",
            "0 can be exported",
        ),
        (config({}, pattern="*-*E"), "model.qk_norm = false: Qwen3Moe has norms of queries and keys", "Mixtral"),
        (config({}, pattern="*E", bias=("q",)), "model.bias has ['q']", "leave them out"),
        (config({}, pattern="*E", bias=("ffn",)), "model.bias has ['ffn']: Mixtral has no biases", "leave them out"),
        (
            config({}, pattern="*E", bias=("ffn",), qk_norm=True),
            "model.bias has ['ffn']: Qwen3Moe's experts have no biases",
            "leave them out",
        ),
        (config(bias=("q", "k", "v")), "model.bias has ['q', 'k', 'v'] of attention", "all of"),
        (config(bias=("output",)), "model.bias has ['output'] of attention", "all of"),
        (config(bias=("q", "k"), qk_norm=True), "model.bias has ['q', 'k'] of attention", "or none"),
        (config(bias=("ffn",), qk_norm=True), "model.qk_norm = true: a Llama has no norms", "Qwen3"),
        (config(pattern="*--"), "model.pattern = '*--': layers 1, 3 have no mixer", "'*-' can be exported"),
        (config(pattern="*-3*"), "model.pattern = '*-3*': layers 1, 2, 3 have no feed-forward", "'*-' can"),
        (config(num_heads=3, head_dim=8), "model.num_heads = 3: LlamaConfig refuses", "Qwen3"),
        (config(position="alibi"), 'model.position = "alibi"', '"rope" can be exported'),
        (config(norm="layernorm"), 'model.norm = "layernorm"', '"rmsnorm" can be exported'),
        (config(norm_placement="sandwich"), 'model.norm_placement = "sandwich"', '"pre" can be exported'),
        (config(ffn_activation="relu2"), 'model.ffn_activation = "relu2"', '"swiglu" can be exported'),
        (config(distinct_layers=2), "model.distinct_layers = 2", "0 can be exported"),
        (config(pattern="[*-]*-"), "model.pattern = '[*-]*-': no class has layers", "without [ ]"),
        (config(pattern="S-"), "model.pattern = 'S-': layers 0, 1, 2 and 1 more have an S4D", "'*-' can"),
        (config(pattern="L-"), "model.pattern = 'L-': layers 0, 1, 2 and 1 more have sliding-window attention", "'*-'"),
        (config(rope_scaling={"kind": "ntk", "factor": 2.0}), 'model.rope_scaling.kind = "ntk"', "yarn"),
        (
            config({}, pattern="ME*E", mamba2={"num_heads": 4, "head_dim": 8}),
            "model.moe.num_shared_experts = 0: a GraniteMoeHybrid",
            "1 can be exported",
        ),
        (
            config(pattern="M", mamba2={"num_heads": 3, "head_dim": 8}),
            "model.mamba2.num_heads = 3: times model.mamba2.head_dim = 8 is 24",
            "4 heads would fit",
        ),
        (
            config(DEEPSEEK, pattern="+E @0-1 +-", latent=LATENT, norm_eps=1e-5),
            "model.norm_eps = 1e-05: the norms of a DeepSeek-V3's latents",
            "1e-06 can be exported",
        ),
        (
            config(DEEPSEEK, pattern="+E+-", latent=LATENT, norm_eps=1e-6),
            "model.pattern = '+E+-': a dense layer follows one of experts",
            "'+E @0-2 +-'",
        ),
        (
            config(norm="rmsnorm_zero_centred", ffn_activation="geglu"),
            "model.embedding_multiplier = 1.0: a Gemma multiplies by the root of model.hidden_size = 16",
            "4.0 can be exported",
        ),
        (
            config(position="learned", max_positions=9, norm="layernorm", ffn_activation="gelu_tanh", bias=("ffn",)),
            "model.bias lacks ['q', 'k', 'v', 'output']: GPT2",
            "biases everywhere",
        ),
    ],
)
def test_what_no_class_is_is_refused_with_key_and_way_out(ours: ModelConfig, beginning: str, way_out: str) -> None:
    (reason,) = reasons(ours)
    assert reason.startswith(beginning)
    assert way_out in reason


def test_every_reason_is_given_at_once() -> None:
    ours = config({"num_shared_experts": 1, "normalise_top_k": False}, pattern="*-*E", bias=("q", "ffn"))
    keys = [reason.split(" ", 2)[0] for reason in reasons(ours)]
    assert keys == ["model.qk_norm", "model.moe.num_shared_experts", "model.bias", "model.bias"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "gpt_neox"}, "model_type = 'gpt_neox': must be one of"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.factor: is missing"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"sliding_window": 128, "use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: has \\['sliding_attention'\\]"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ],
)
def test_a_foreign_config_that_computes_otherwise_is_refused(change: dict[str, object], problem: str) -> None:
    ours = config(qk_norm=True)
    foreign = {"model_type": "qwen3"} | choose_family(ours).to_foreign(ours)
    with pytest.raises(ValueError, match=problem):
        config_from_foreign(foreign | change)


def test_every_key_of_a_stretching_that_is_missing_is_told_at_once() -> None:
    ours = config(qk_norm=True)
    foreign = {"model_type": "qwen3"} | choose_family(ours).to_foreign(ours)
    foreign |= {"rope_parameters": {"rope_type": "yarn", "truncate": False, "partial_rotary_factor": 0.5}}
    with pytest.raises(ForeignConfigError) as refused:
        config_from_foreign(foreign)
    told = [line.split(":")[0].split(" ")[0].removeprefix("rope_parameters.") for line in refused.value.problems]
    assert told == ["partial_rotary_factor", "factor", "truncate", "original_max_position_embeddings"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": ["x"]}, "model_type = ['x']: must be one of ['bloom',"),
        ({"rope_parameters": [1]}, "rope_parameters = [1]: must be an object, or null"),
        (
            {"rope_parameters": {"rope_theta": "1e4"}},
            "rope_parameters.rope_theta = '1e4': must be a finite number above 0",
        ),
        ({"hidden_size": "64"}, "hidden_size = '64': must be a whole number of 1 to 16777216"),
        ({"hidden_size": True}, "hidden_size = True: must be a whole number of 1 to 16777216"),
        ({"hidden_size": 10**5000}, "hidden_size = a number of many digits: must be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: must be a whole number of 1 to 16384"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0: must be a whole number of 1 to 16777216, or null"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: must be a finite number above 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no': must be true or false"),
        ({"hidden_act": ["silu"] * 99}, "hidden_act = ['silu', 'silu',"),
        ({"head_dim": 7}, "head_dim = 7: must be even, because RoPE turns pairs; 6 or 8 would fit"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide num_attention_heads = 2;"),
    ],
)
def test_a_damaged_foreign_config_is_told_by_its_own_key(change: dict[str, object], problem: str) -> None:
    ours = config(qk_norm=True)
    foreign = {"model_type": "qwen3"} | choose_family(ours).to_foreign(ours)
    with pytest.raises(ForeignConfigError) as caught:
        config_from_foreign(foreign | change)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(problem)
    assert len(caught.value.problems[0]) < 300


def test_every_missing_and_wrong_key_of_a_foreign_config_is_told_at_once() -> None:
    with pytest.raises(ForeignConfigError) as caught:
        config_from_foreign({"model_type": "qwen3_moe", "mlp_only_layers": [-1], "num_experts": None})
    keys = [line.partition(" ")[0].rstrip(":") for line in caught.value.problems]
    needed = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
    assert keys == [*needed, "intermediate_size", "moe_intermediate_size", "num_experts", "mlp_only_layers"]


# Looked at where it is read, whatever it holds.
COMPARED_ALONE = {"time_step_limit", "layers_block_type"}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_key_that_a_family_reads_has_its_rule(family: Family) -> None:
    """A key without one would be taken as it stands, whatever it holds."""

    class Seen(dict[str, Any]):
        def __contains__(self, key: object) -> bool:
            read.add(str(key))
            return super().__contains__(key)

        def __getitem__(self, key: str) -> Any:
            read.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

    read: set[str] = set()
    sizes = dict.fromkeys(family.needed, 4)
    family.to_ours(Seen(sizes))
    assert {*family.needed, "initializer_range"} <= read
    assert read <= KINDS.keys() | COMPARED_ALONE
    for key in family.needed:
        with pytest.raises(KeyError):
            family.to_ours({name: size for name, size in sizes.items() if name != key})


def test_all_that_a_foreign_config_asks_for_and_is_not_computed_is_told_at_once() -> None:
    ours = config({"num_shared_experts": 1}, pattern="ME*E", mamba2={"num_heads": 4, "head_dim": 8})
    foreign = {"model_type": "granitemoehybrid"} | choose_family(ours).to_foreign(ours)
    wrong = {"hidden_act": "gelu", "normalization_function": "layernorm", "time_step_limit": [0.1, 0.2]}
    with pytest.raises(ForeignConfigError) as caught:
        config_from_foreign(foreign | wrong)
    assert [line.split(" ")[0] for line in caught.value.problems] == list(wrong)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shared_intermediate_size": 24}, "shared_intermediate_size = 24: only multiples of intermediate_size = 16"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi': only 'rope' or null"),
        ({"layer_types": ["mamba"] * 3}, "layer_types: has 3 entries; must be 4 of"),
        ({"layer_types": ["mamba", "x", "mamba", "x"]}, "layer_types: has ['x']; must be 4 of"),
    ],
)
def test_a_granite_that_is_none_of_ours_is_told_by_its_own_key(change: dict[str, object], problem: str) -> None:
    ours = config({"num_shared_experts": 1}, pattern="ME*E", mamba2={"num_heads": 4, "head_dim": 8})
    foreign = {"model_type": "granitemoehybrid"} | choose_family(ours).to_foreign(ours)
    with pytest.raises(ForeignConfigError) as caught:
        config_from_foreign(foreign | change)
    assert caught.value.problems[0].startswith(problem)
