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
