"""A refusal to export names the class with the model's mixer, in words that read well, and each thing once."""

from typing import Any

import pytest

from meshwright.model.config import ModelConfig
from meshwright.model.families.choose import NotRepresentableError, choose_family

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "vocab_size": 64}


def refused(**changes: Any) -> NotRepresentableError:
    with pytest.raises(NotRepresentableError) as error:
        choose_family(ModelConfig(**(SIZES | changes)))
    return error.value


def test_the_nearest_class_is_one_that_has_the_mixer() -> None:
    found = refused(pattern="m-")
    assert found.class_name == "MambaForCausalLM"
    assert found.reasons == ["model.pattern = 'm-': layers 0, 1 have an MLP; 'm' can be exported"]


@pytest.mark.parametrize(("pattern", "words"), [("*-m-", "layer 1 has a Mamba-1;"), ("*-S-", "layer 1 has an S4D;")])
def test_parts_have_the_article_that_is_spoken(pattern: str, words: str) -> None:
    assert any(words in reason for reason in refused(pattern=pattern, num_heads=2).reasons)


def test_keys_that_go_away_with_another_one_are_not_told_beside_it() -> None:
    found = refused(num_heads=2, position="t5", t5_buckets=8, t5_max_distance=64)
    assert [reason.partition(":")[0] for reason in found.reasons] == ['model.position = "t5"']


# Keys at the top of [model] with a value that no Mamba of transformers computes.
NO_MAMBAS: list[dict[str, Any]] = [
    {"norm": "layernorm"},
    {"norm": "dynamic_tanh"},
    {"norm": "rmsnorm_zero_centred"},
    {"norm_placement": "sandwich"},
    {"norm_placement": "deepnorm"},
    {"embedding_norm": True},
    {"final_norm": False},
    {"embedding_multiplier": 2.0},
    {"residual_multiplier": 0.5},
    {"logits_scaling": 8.0},
    {"distinct_layers": 1},
    {"position": "learned", "max_positions": 32},
    {"position": "sinusoidal"},
]


@pytest.mark.parametrize("changes", NO_MAMBAS, ids=str)
@pytest.mark.parametrize("pattern", ["M", "m", "M-"])
def test_what_a_pure_state_model_has_besides_its_layers_is_looked_at(pattern: str, changes: dict[str, Any]) -> None:
    tables: dict[str, Any] = {"mamba2": {"head_dim": 8}} if "M" in pattern else {"mamba1": {"dt_rank": 3}}
    plain = {"pattern": pattern, "num_layers": 2, **tables}
    if pattern != "M-":
        choose_family(ModelConfig(**(SIZES | plain)))
    granites = {"embedding_multiplier", "residual_multiplier", "logits_scaling"}
    if pattern == "M-" and granites & changes.keys():
        return  # Granite has these
    key = next(iter(changes))
    assert any(f"model.{key} = " in reason for reason in refused(**plain, **changes).reasons)
