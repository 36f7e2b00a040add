"""The [model] table fills in sizes that follow from others and says what makes no model."""

from typing import Any

import pytest
from pydantic import ValidationError

from meshwright.model.config import ModelConfig
from meshwright.model.kinds.sizes import round_up
from meshwright.model.presets import preset
from meshwright.parallel.fits import divisors, nearest

SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 96, "num_heads": 6}
MOE: dict[str, Any] = {"num_experts": 8, "top_k": 2, "expert_hidden_size": 32}


def problems(**changes: Any) -> list[str]:
    return ModelConfig.model_validate({**SIZES, **changes}).problems()


def test_sizes_that_follow_from_others_are_filled_in() -> None:
    config = ModelConfig.model_validate(SIZES)
    assert (config.num_kv_heads, config.head_dim, config.ffn_hidden_size) == (6, 16, 256)


def test_given_sizes_stay() -> None:
    config = ModelConfig.model_validate({**SIZES, "num_kv_heads": 2, "head_dim": 32, "ffn_hidden_size": 100})
    assert (config.num_kv_heads, config.head_dim, config.ffn_hidden_size) == (2, 32, 100)


def test_a_table_is_closed_strict_and_frozen() -> None:
    for wrong in ({"num_layer": 3}, {"num_layers": "4"}, {"num_layers": True}, {"norm_eps": float("inf")}):
        with pytest.raises(ValidationError):
            ModelConfig.model_validate({**SIZES, **wrong})
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig.model_validate(SIZES).num_layers = 5


def test_sound_sizes_have_no_problems() -> None:
    assert problems() == []
    assert problems(pattern="*-*E", moe=MOE, bias=["q", "ffn"]) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_kv_heads": 4}, "model.num_kv_heads = 4: must divide model.num_heads = 6; one of [1, 2, 3, 6] would fit"),
        (
            {"num_heads": 5},
            "model.num_heads = 5: must divide model.hidden_size = 96, or model.head_dim be given;"
            " one of [1, 2, 3, 4, 6, 8, 12, 16] would fit",
        ),
        ({"head_dim": 1}, "model.head_dim = 1: must be even, because RoPE turns pairs; 2 would fit"),
        ({"head_dim": 15}, "model.head_dim = 15: must be even, because RoPE turns pairs; 14 or 16 would fit"),
        (
            {"pattern": "*-*E*-", "moe": MOE},
            "model.num_layers = 4: must be a multiple of the 3 layers of"
            ' model.pattern = "*-*E*-"; one of [3, 6] would fit',
        ),
        (
            {"pattern": "*E", "moe": {**MOE, "top_k": 9}},
            "model.moe.top_k = 9: must not exceed model.moe.num_experts = 8; 1 to 8 would fit",
        ),
    ],
)
def test_sizes_that_do_not_fit_say_which_would(changes: dict[str, Any], line: str) -> None:
    assert problems(**changes) == [line]


def test_a_num_heads_that_is_said_to_fit_fits() -> None:
    fits = [heads for heads in divisors(96) if not problems(num_heads=heads)]
    assert problems(num_heads=5)[0].endswith(f"one of {nearest(fits, 5)} would fit")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"pattern": "*E"}, "a table [model.moe]"),
        ({"moe": MOE}, "nothing uses the table [model.moe]"),
        (
            {"pattern": "*- @9 *"},
            "layer 9 is none of model.num_layers = 4; layers 0 to 3 would fit, or model.num_layers = 10",
        ),
        (
            {"pattern": "*- @9 *", "num_layers": 1},
            "layer 9 is none of model.num_layers = 1; layer 0 would fit, or model.num_layers = 10",
        ),
        ({"pattern": "*- @3-1 *"}, "@3-1: 3-1 counts down"),
        ({"pattern": "*x"}, "character 2"),
        ({"pattern": "(*[)-]"}, "character 4: this ) closes a group that has a [ or ] without its other one"),
        ({"bias": ["q", "v", "q"]}, 'model.bias = ["q", "v", "q"]: has a place twice; ["q", "v"] would fit'),
        (
            {"hidden_size": 1, "num_heads": 4},
            "model.num_heads = 4: must divide model.hidden_size = 1, or model.head_dim be given; head_dim = 2 would",
        ),
    ],
)
def test_a_pattern_and_its_tables_go_together(changes: dict[str, Any], part: str) -> None:
    assert len(problems(**changes)) == 1
    assert part in problems(**changes)[0]


def test_the_vocabulary_is_filled_in_from_the_tokenizer() -> None:
    assert preset("dense-tiny").with_vocab(1000).vocab_size == 1024
    assert preset("dense-tiny", vocab_size=1000).with_vocab(1000).vocab_size == 1000
    with pytest.raises(ValueError, match=r"model\.vocab_size = 999: must hold the tokenizer's 1000 tokens"):
        preset("dense-tiny", vocab_size=999).with_vocab(1000)


def test_whole_numbers_are_cut_and_rounded() -> None:
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert nearest([1, 2, 4, 8, 16], 6, most=2) == [4, 8]
    assert (round_up(64), round_up(65)) == (64, 128)


DEFAULTS: dict[str, Any] = {"num_layers": 4, "hidden_size": 96}
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 64}
# Of each key that only some kinds read a value that is not its default, what it needs beside it, and a pattern.
OF_ATTENTION: dict[str, dict[str, Any]] = {
    "num_heads": {"num_heads": 6},
    "qk_norm": {"qk_norm": True},
    "attention_scale": {"attention_scale": 0.1},
    "attention_dropout": {"attention_dropout": 0.1},
    "attention_gate": {"attention_gate": True},
    "rope_base": {"rope_base": 500.0},
    "rope_fraction": {"rope_fraction": 0.5},
    "rope_scaling": {"rope_scaling": YARN},
}
OF_FEEDFORWARDS: dict[str, dict[str, Any]] = {
    "ffn_activation": {"ffn_activation": "relu2"},
    "ffn_dropout": {"ffn_dropout": 0.1},
}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
TABLES = {"latent": LATENT, "switch_head": {"num_experts": 3, "top_k": 2}, "moe": MOE}
OF_KEY = {**OF_ATTENTION, **OF_FEEDFORWARDS}


@pytest.mark.parametrize("pattern", ["M", "m", "G", "S", "M-", "*"])
@pytest.mark.parametrize("key", OF_KEY)
def test_a_key_is_refused_where_no_part_reads_it(pattern: str, key: str) -> None:
    is_read = "*" in pattern if key in OF_ATTENTION else "-" in pattern
    sizes = SIZES if "*" in pattern else DEFAULTS
    found = ModelConfig.model_validate({**sizes, "pattern": pattern, **OF_KEY[key]}).problems()
    if is_read:
        assert found == []
    else:
        reader = "attention (*)" if key in OF_ATTENTION else "MLP (-)"
        assert len(found) == 1
        assert found[0].startswith(f"model.{key}")
        assert f'nothing in model.pattern = "{pattern}" reads it; {reader} does; ' in found[0]


def test_what_is_said_of_a_key_without_a_reader_names_value_and_way_out() -> None:
    found = ModelConfig.model_validate({**DEFAULTS, "pattern": "M-", "qk_norm": True}).problems()
    assert found == [
        'model.qk_norm = true: nothing in model.pattern = "M-" reads it; attention (*) does; false would fit'
    ]


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({"pattern": "+-", "latent": LATENT, "qk_norm": True}, ["model.qk_norm = true: nothing"]),
        ({"pattern": "+-", "latent": LATENT, "num_kv_heads": 2}, ["model.num_kv_heads = 2: nothing"]),
        ({"pattern": "+-", "latent": LATENT, "head_dim": 8}, ["model.head_dim = 8: nothing"]),
        ({"pattern": "+-", "latent": LATENT, "attention_gate": True}, ["model.attention_gate = true: nothing"]),
        ({"pattern": "+-", "latent": LATENT, "bias": ["q"]}, ['model.bias = ["q"]: latent attention (+)']),
        ({"pattern": "+-", "latent": LATENT, "bias": ["q", "output"]}, ['model.bias = ["q", "output"]: latent']),
        ({"pattern": "+-", "latent": LATENT, "bias": ["q", "k", "v", "output"]}, []),
        ({"pattern": "+-", "latent": LATENT, "head_dim": 16, "num_kv_heads": 6, "rope_scaling": YARN}, []),
        ({"pattern": "H-", "switch_head": TABLES["switch_head"], "num_kv_heads": 3}, ["model.num_kv_heads = 3: noth"]),
        (
            {"pattern": "H-", "switch_head": TABLES["switch_head"], "bias": ["q", "ffn"]},
            ['model.bias has "q": nothing in'],
        ),
        ({"pattern": "H-", "switch_head": TABLES["switch_head"], "head_dim": 8, "attention_scale": 0.1}, []),
        ({"pattern": "*", "bias": ["v", "ffn"]}, ['model.bias has "ffn": nothing in']),
        ({"pattern": "L-", "rope_base": 500.0}, []),
        ({"pattern": "L-", "rope_base": 500.0, "sliding": {"rope_base": 9.0}}, ["model.rope_base = 500.0: nothing"]),
        ({"pattern": "*E", "moe": MOE, "ffn_dropout": 0.1}, ["model.ffn_dropout = 0.1: nothing"]),
        ({"pattern": "*E", "moe": {**MOE, "num_shared_experts": 1}, "ffn_dropout": 0.1}, []),
        ({"position": "none", "rope_base": 500.0}, ['model.rope_base = 500.0: is for model.position = "rope"']),
        ({"position": "alibi", "rope_fraction": 0.5}, ['model.rope_fraction = 0.5: is for model.position = "rope"']),
        ({"t5_buckets": 8}, ['model.t5_buckets = 8: is for model.position = "t5"']),
        ({"t5_max_distance": 8}, ['model.t5_max_distance = 8: is for model.position = "t5"']),
        ({"position": "t5", "t5_buckets": 8, "t5_max_distance": 9}, []),
        ({"qk_norm_over": "tokens"}, ['model.qk_norm_over = "tokens": is for model.qk_norm = true']),
        ({"qk_norm_over": "tokens", "qk_norm": True}, []),
        ({"norm_placement": "hybrid_norm"}, []),
        ({"pattern": "*-L-B-", "norm_placement": "hybrid_norm", "num_layers": 3, "block_sparse": {}}, []),
        ({"pattern": "*-M-", "norm_placement": "hybrid_norm"}, ['model.norm_placement = "hybrid_norm": normalises']),
        ({"pattern": "+-", "latent": LATENT, "norm_placement": "hybrid_norm"}, ["model.norm_placement = "]),
    ],
)
def test_keys_and_the_parts_that_read_them_go_together(changes: dict[str, Any], begins: list[str]) -> None:
    found = problems(**changes)
    assert len(found) == len(begins), found
    assert all(line.startswith(begin) for line, begin in zip(found, begins, strict=True)), found


@pytest.mark.parametrize("position", ["alibi", "t5"])
def test_positions_of_attention_are_refused_without_it(position: str) -> None:
    (found,) = ModelConfig.model_validate({**DEFAULTS, "pattern": "M-", "position": position}).problems()
    assert found.startswith(f'model.position = "{position}": nothing in model.pattern = "M-" reads it; attention (*)')
    assert ModelConfig.model_validate({**DEFAULTS, "pattern": "M-", "position": "sinusoidal"}).problems() == []
