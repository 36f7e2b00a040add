"""The [model] table fills in sizes that follow from others and says what makes no model."""

from typing import Any

import pytest
from pydantic import ValidationError

from meshwright.model.config import ModelConfig, round_up
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
        ({"pattern": "M"}, "Mamba-2) is not in this version"),
        ({"pattern": "*x"}, "character 2"),
    ],
)
def test_a_pattern_and_its_tables_go_together(changes: dict[str, Any], part: str) -> None:
    assert len(problems(**changes)) == 1
    assert part in problems(**changes)[0]


def test_the_vocabulary_is_filled_in_from_the_tokenizer() -> None:
    assert preset("tiny").with_vocab(1000).vocab_size == 1024
    assert preset("tiny", vocab_size=1000).with_vocab(1000).vocab_size == 1000
    with pytest.raises(ValueError, match=r"model\.vocab_size = 999: must hold the tokenizer's 1000 tokens"):
        preset("tiny", vocab_size=999).with_vocab(1000)


def test_whole_numbers_are_cut_and_rounded() -> None:
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert nearest([1, 2, 4, 8, 16], 6, most=2) == [4, 8]
    assert (round_up(64), round_up(65)) == (64, 128)
