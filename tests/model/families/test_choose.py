"""Each configuration goes to the class that is exactly it; what none can be is refused by key, with a way out."""

from math import prod
from typing import Any

import pytest

from meshwright.model.config import ModelConfig, MoeConfig
from meshwright.model.costs import parameter_count
from meshwright.model.families.choose import (
    FAMILIES,
    ForeignConfigError,
    NotRepresentableError,
    choose_family,
    config_from_foreign,
)
from meshwright.model.families.family import Family
from meshwright.model.families.foreign_keys import KINDS
from meshwright.model.presets import PRESETS, preset

MOE = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 16}


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
        assert "Qwen3Moe (qk_norm = true)" in reason


def test_un_normalised_weights_are_a_flag_of_qwen3_moe() -> None:
    ours = config({"normalise_top_k": False}, pattern="*E", qk_norm=True)
    assert choose_family(ours).to_foreign(ours)["norm_topk_prob"] is False


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_class_whose_tensors_hold_its_weights(name: str) -> None:
    ours = preset(name).with_vocab(1000)
    family = choose_family(ours)
    assert sum(prod(row.shape) for row in family.mapping(ours)) == parameter_count(ours)
    public = {"llama3-8b": "llama", "llama2-70b": "llama", "mixtral-8x7b": "mixtral", "qwen3-30b-a3b": "qwen3_moe"}
    assert family.model_type == public.get(name, family.model_type)


def test_dense_layers_between_experts_are_listed() -> None:
    ours = config({}, pattern="*-*E", qk_norm=True)
    assert choose_family(ours).to_foreign(ours)["mlp_only_layers"] == [0, 2]


@pytest.mark.parametrize(
    ("ours", "beginning", "way_out"),
    [
        (config({"num_shared_experts": 1}, pattern="*E"), "model.moe.num_shared_experts = 1", "0 can be exported"),
        (
            config({"num_shared_experts": 2}, pattern="*E", qk_norm=True),
            "model.moe.num_shared_experts = 2",
            "GraniteMoeShared",
        ),
        (config({}, pattern="*-*E"), "model.pattern = '*-*E': layers 0, 2 have an MLP", "qk_norm = true"),
        (config({}, pattern="*E", bias=("q",)), "model.bias has ['q']", "leave them out"),
        (config({}, pattern="*E", bias=("ffn",)), "model.bias has 'ffn': experts have no biases", "leave 'ffn' out"),
        (
            config({}, pattern="*E", bias=("ffn",), qk_norm=True),
            "model.bias has 'ffn': experts have no biases",
            "leave 'ffn' out",
        ),
        (config(bias=("q", "k", "v")), "model.bias has ['q', 'k', 'v'] of attention", "Qwen2"),
        (config(bias=("output",)), "model.bias has ['output'] of attention", "all of"),
        (config(bias=("q", "k"), qk_norm=True), "model.bias has ['q', 'k'] of attention", "or none"),
        (config(bias=("ffn",), qk_norm=True), "model.bias has 'ffn': Qwen3's MLP", "take Llama"),
        (config(pattern="M-"), "model.pattern = 'M-': the mixer mamba2", "the letter *"),
        (config(pattern="*--"), "model.pattern = '*--': layers 1, 3 have no mixer", "every layer needs attention"),
        (config(pattern="*-3*"), "model.pattern = '*-3*': layers 1, 2, 3 have no feed-forward", "such as '*-'"),
        (config(num_heads=3, head_dim=8), "model.num_heads = 3: LlamaConfig refuses", "Qwen3"),
    ],
)
def test_what_no_class_is_is_refused_with_key_and_way_out(ours: ModelConfig, beginning: str, way_out: str) -> None:
    (reason,) = reasons(ours)
    assert reason.startswith(beginning)
    assert way_out in reason


def test_every_reason_is_given_at_once() -> None:
    ours = config({"num_shared_experts": 1, "normalise_top_k": False}, pattern="*-*E", bias=("q", "ffn"))
    keys = [reason.split()[0] for reason in reasons(ours)]
    assert keys == [
        "model.moe.num_shared_experts",
        "model.bias",
        "model.pattern",
        "model.moe.normalise_top_k",
        "model.bias",
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2': must be one of"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"sliding_window": 128, "use_sliding_window": True}, "sliding_window = 128"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ],
)
def test_a_foreign_config_that_computes_otherwise_is_refused(change: dict[str, object], problem: str) -> None:
    ours = config(qk_norm=True)
    foreign = {"model_type": "qwen3"} | choose_family(ours).to_foreign(ours)
    with pytest.raises(ValueError, match=problem):
        config_from_foreign(foreign | change)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": ["x"]}, "model_type = ['x']: must be one of ['llama',"),
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


# qwen3 copies what it reads, so that its reads are not seen; what it reads is a part of what qwen3_moe does.
@pytest.mark.parametrize("family", [family for name, family in FAMILIES.items() if name != "qwen3"])
def test_every_key_that_a_family_reads_has_its_rule(family: Family) -> None:
    """A key without one would be taken as it stands, whatever it holds."""

    class Seen(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            read.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

    read: set[str] = set()
    sizes = dict.fromkeys(family.needed, 2)
    family.to_ours(Seen(sizes))
    assert {"hidden_size", "rope_theta"} <= read
    assert read <= KINDS.keys()
    for key in family.needed:
        with pytest.raises(KeyError):
            family.to_ours({name: size for name, size in sizes.items() if name != key})
