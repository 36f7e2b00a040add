"""Every key of the classes in transformers is read, refused or harmless; and what is read is what the class reads."""

import json
from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny_exports import CONFIGS, tiny_tokens

from meshwright.model.config import ModelConfig
from meshwright.model.counts.costs import parameter_count
from meshwright.model.families.choose import FAMILIES, ForeignConfigError, config_from_foreign
from meshwright.model.families.family import Family
from meshwright.model.families.foreign_keys import KINDS, REFUSED, renamed

transformers = pytest.importorskip("transformers")

# Of every class: what is no part of the model, and the ends of a text.
HARMLESS = {
    "model_type", "architectures", "transformers_version", "_name_or_path", "dtype", "return_dict",
    "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder", "id2label",
    "label2id", "problem_type", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
}  # fmt: skip
_ROPE: dict[str, Any] = {"max_position_embeddings": 77}  # a bound, where positions are not stretched
_EXPERTS: dict[str, Any] = {"output_router_logits": True}
_STEPS: dict[str, Any] = {"time_step_min": 0.01, "time_step_max": 0.2, "time_step_floor": 0.02}
_STATE: dict[str, Any] = {**_STEPS, "rescale_prenorm_residual": True, "residual_in_fp32": False}
# What one class has besides and does not change its logits in evaluation, each with another value than its default.
HARMLESS_OF: dict[str, dict[str, Any]] = {
    "llama": _ROPE,
    "qwen3": {**_ROPE, "sliding_window": 5, "max_window_layers": 0},  # without effect unless use_sliding_window
    "mixtral": {**_ROPE, **_EXPERTS, "router_jitter_noise": 0.3},
    "qwen3_moe": {**_ROPE, **_EXPERTS, "sliding_window": 5},
    "gemma": _ROPE,
    "olmo2": _ROPE,
    "olmoe": {**_ROPE, **_EXPERTS},
    "deepseek_v3": {**_ROPE, "output_router_logits": True, "num_nextn_predict_layers": 0},
    "granitemoehybrid": {**_ROPE, **_EXPERTS, "mamba_chunk_size": 7},
    "mamba2": {**_STATE, "time_step_rank": 3, "chunk_size": 7},
    "mamba": {
        **_STATE,
        "time_step_scale": 2.0,
        "time_step_init_scheme": "constant",
        "use_mambapy": False,  # true asks for another package
        "use_associative_scan": False,
    },
    "qwen3_next": {**_ROPE, **_EXPERTS},
    "bloom": {"pretraining_tp": 2},
    "gpt2": {
        "summary_type": "mean",
        "summary_use_proj": False,
        "summary_activation": "tanh",
        "summary_proj_to_labels": False,
        "summary_first_dropout": 0.3,
    },
}


def of_class(family: Family, keys: dict[str, Any]) -> dict[str, Any]:
    """Return what the class makes of a file's keys, as it writes all of them."""
    config = transformers.AutoConfig.for_model(family.model_type, **deepcopy(keys))  # it writes into its tables
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found


def smallest(family: Family) -> dict[str, Any]:
    """Return the keys that must be there, with the class's own values."""
    usual = of_class(family, {})
    if family.model_type == "granitemoehybrid":  # whose own value does not divide shared_intermediate_size
        usual["intermediate_size"] = 512
    return {key: usual[key] for key in family.needed}


def with_rank(config: ModelConfig) -> ModelConfig:
    """Return the config with Mamba's rank filled in, which the class does and we do not."""
    if config.mamba1 is None:
        return config
    rank = config.mamba1.rank(config.hidden_size)
    return config.model_copy(update={"mamba1": config.mamba1.model_copy(update={"dt_rank": rank})})


def read_by(family: Family) -> set[str]:
    """Return the keys that the reader asks for in a file that has all of them."""

    class Seen(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            read.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

    read: set[str] = set()
    family.to_ours(Seen(renamed(of_class(family, smallest(family)), family.aliases)))
    return read


FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@FAMILY
def test_every_key_of_the_class_is_read_refused_or_harmless(family: Family) -> None:
    of_its_own, read = set(HARMLESS_OF[family.model_type]), read_by(family)
    keys = set(of_class(family, {}))
    known = read | family.fixed.keys() | REFUSED.keys() | family.aliases.keys() | HARMLESS | of_its_own
    assert keys - known == set()
    assert of_its_own - keys == set(), "the class has no such key any more"
    assert not of_its_own & (read | family.fixed.keys())


@FAMILY
def test_other_names_of_a_key_are_those_of_the_class(family: Family) -> None:
    theirs = type(transformers.AutoConfig.for_model(family.model_type)).attribute_map
    for alias, name in theirs.items():
        assert {alias, name} & (family.aliases.keys() | HARMLESS_OF[family.model_type].keys()), alias


@FAMILY
def test_a_file_that_leaves_keys_out_reads_as_the_class_fills_them_in(family: Family) -> None:
    keys = smallest(family)
    file = {"model_type": family.model_type, **keys}
    assert with_rank(config_from_foreign(file)) == config_from_foreign(of_class(family, keys))


STRETCHED = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 9e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FILES: list[tuple[str, dict[str, Any]]] = [
    ("bloom", {"n_embed": 96, "num_attention_heads": 6, "num_hidden_layers": 3}),
    ("gpt2", {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 3, "max_position_embeddings": 50}),
    ("mixtral", {"num_experts": 4}),
    ("deepseek_v3", {"num_local_experts": 16}),
    ("llama", {"rope_theta": 5e5}),
    ("llama", {"rope_scaling": STRETCHED, "rope_theta": 5e5}),
    ("llama", {"rope_scaling": STRETCHED, "rope_parameters": {"rope_type": "default", "rope_theta": 7e3}}),
    ("llama", {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e3}}),
    ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 4096}),
    ("qwen3", {"rope_scaling": STRETCHED, "sliding_window": 128}),
    ("qwen3_next", {"partial_rotary_factor": 0.5}),
    ("qwen3_next", {"full_attention_interval": 2}),
]


@pytest.mark.parametrize(("model_type", "keys"), FILES)
def test_a_file_in_another_spelling_reads_as_the_class_reads_it(model_type: str, keys: dict[str, Any]) -> None:
    family = FAMILIES[model_type]
    canonical = {name: value for name, value in smallest(family).items() if name not in renamed(keys, family.aliases)}
    found = config_from_foreign({"model_type": model_type, **canonical, **keys})
    assert found == config_from_foreign(of_class(family, {**canonical, **keys}))
    assert found != config_from_foreign({"model_type": model_type, **smallest(family)}), "nothing was said"


def test_a_length_beside_the_table_is_preferred_as_the_class_does() -> None:
    keys = {**smallest(FAMILIES["llama"]), "rope_scaling": STRETCHED, "original_max_position_embeddings": 48}
    config = transformers.AutoConfig.for_model("llama", **deepcopy(keys))
    config.standardize_rope_params()  # as its rotary embedding does
    ours = config_from_foreign({"model_type": "llama", **keys}).rope_scaling
    assert ours is not None
    assert ours.original_length == config.rope_parameters["original_max_position_embeddings"] == 48


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    (
        "qwen3",
        {"quantization_config": {"quant_method": "fp8"}},
        "quantization_config = {'quant_method': 'fp8'}: only None can be read; its weights are packed; a copy that was"
        " written dequantised, in bf16, fp16 or fp32, can be read",
    ),
    ("gpt2", {"compression_config": {"format": "pack"}}, "compression_config = {'format': 'pack'}: only None"),
    ("llama", {"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config = {'0': "),
    (
        "llama",
        {"transformers_weights": "other.safetensors"},
        "transformers_weights = 'other.safetensors': only None or",
    ),
    (
        "mixtral",
        {"sliding_window": 4096},
        "sliding_window = 4096: only None can be read; tokens would see only so many before them; a checkpoint whose"
        " layers attend to all tokens can be read",
    ),
    ("olmoe", {"sliding_window": 4096}, "sliding_window = 4096: only None can be read; tokens would"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0: only None can be read; queries, keys and values would be clipped"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window = True: only False can be read; tokens would"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window = True: only False can be read; tokens would"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout = 0.1: only 0.0 can be read; it changes training alone"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: the class turns whole heads; only 1.0"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5: the class turns whole heads",
    ),
    (
        "qwen3",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters.full_attention = {'rope_theta': 10000.0}: is of one kind of layer; only one set for all",
    ),
    ("llama", {"rope_scaling": {**STRETCHED, "truncate": False}}, "rope_parameters.truncate = False: yarn's ramp"),
    (
        "deepseek_v3",
        {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}},
        "rope_parameters.mscale_all_dim = 1.0: can be read with rope_type = 'yarn' alone",
    ),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads = 2: follows from num_attention_heads; only 128"),
    ("deepseek_v3", {"head_dim": 32}, "head_dim = 32: follows from qk_rope_head_dim; only 64 can be read"),
    ("deepseek_v3", {"qk_head_dim": 9}, "qk_head_dim = 9: follows from qk_nope_head_dim + qk_rope_head_dim; only 192"),
    ("bloom", {"n_embed": 8}, "n_embed = 8: is another name of hidden_size = 64; leave one of them out"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True: only"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm = True"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True: only False"),
    ("mamba2", {"expand": 3}, "expand = 3: times hidden_size = 4096 must be num_heads * head_dim = 8192"),
    ("mamba2", {"time_step_limit": [0.0, 1.0]}, "time_step_limit = [0.0, 1.0]: only steps without limits"),
    ("mamba2", {"head_dim": None}, "head_dim = None: must be a whole number of 1 to 16777216"),
]


@pytest.mark.parametrize(("model_type", "keys", "begins"), REFUSALS)
def test_what_is_not_computed_here_is_refused_by_name(model_type: str, keys: dict[str, Any], begins: str) -> None:
    with pytest.raises(ForeignConfigError) as refused:
        config_from_foreign({"model_type": model_type, **smallest(FAMILIES[model_type]), **keys})
    (line,) = refused.value.problems
    assert line.startswith(begins)
    assert len(line) < 300


def tiny_keys(family: Family) -> dict[str, Any]:
    """Return the keys of a tiny model of the class."""
    return {key: values[0] for key, values in family.fixed.items()} | family.to_foreign(CONFIGS[family.model_type])


@FAMILY
@torch.no_grad()
def test_a_null_is_told_in_one_line_or_taken_as_the_class_takes_it(family: Family) -> None:
    config = transformers.AutoConfig.for_model(family.model_type, **tiny_keys(family))
    whole = renamed(config.to_dict(), family.aliases)
    taken = []
    for key in sorted((KINDS.keys() | family.fixed.keys() | {"time_step_limit"}) & whole.keys()):
        file = whole | {key: None}
        try:
            ours = config_from_foreign(file)
        except ForeignConfigError as refused:
            (line,) = refused.problems
            assert line.startswith(f"{key} = None: "), line
        else:
            theirs = transformers.AutoConfig.for_model(**deepcopy(file))
            model = transformers.AutoModelForCausalLM.from_config(theirs).eval()
            model(tiny_tokens(12).T, use_cache=False)
            assert model.num_parameters() == parameter_count(ours), key
            taken.append(key)
    assert taken or family.model_type in ("mamba", "mamba2", "bloom"), "every null is refused"


def changed_everywhere(family: Family) -> dict[str, Any]:
    """Return another value for every harmless key that can be changed."""
    return {
        **HARMLESS_OF[family.model_type],
        "chunk_size_feed_forward": 2,
        "use_cache": False,
        "output_hidden_states": True,
        "problem_type": "regression",
        "pad_token_id": 3,
        "bos_token_id": 5,
        "eos_token_id": 6,
    }


@FAMILY
@torch.no_grad()
def test_harmless_keys_change_no_logits_of_the_class(family: Family) -> None:
    keys = tiny_keys(family)
    tokens, logits = tiny_tokens(12).T, []
    weights: dict[str, torch.Tensor] = {}
    for more in ({}, changed_everywhere(family)):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family.model_type, **{**keys, **more})
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        weights = weights or model.state_dict()
        model.load_state_dict(weights)
        logits.append(model(tokens).logits)
    assert logits[0].abs().max() > 0.01
    # Another length of chunks adds up the same numbers in another order.
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5 * logits[0].abs().max().item())
