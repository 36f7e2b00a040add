"""A way is chosen only when it is clearly faster, is told with its reason, can be stored, and can be set by hand."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from meshwright.kernels import measure as measuring
from meshwright.kernels.choose import Choices, choices_from_dict, current, use
from meshwright.kernels.measure import measure


def test_pytorchs_own_way_is_taken_until_another_is_set() -> None:
    assert current() == Choices()
    assert set(Choices().to_dict().values()) == {"mkl", "native", "flash"}
    use(Choices(fp32_attention="blocks"))
    assert current().fp32_attention == "blocks"


def test_choices_come_back_from_what_was_stored() -> None:
    choices = Choices("onednn", "mkl", "onednn", "fp32", "blocks", "blocks_fp32")
    assert choices_from_dict(choices.to_dict()) == choices


@pytest.mark.parametrize(("name", "way"), [("fp32_output", "cublas"), ("fp8_products", "native")])
def test_an_unknown_choice_is_refused_by_name(name: str, way: str) -> None:
    with pytest.raises(ValueError, match=f"kernel choice {name} = '{way}' is not known"):
        choices_from_dict({name: way})


def test_measuring_gives_a_reason_for_every_choice_and_changes_nothing() -> None:
    use(Choices(bf16_products="fp32"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    measured = measure()
    threads = torch.get_num_threads()
    torch.set_num_threads(before)
    assert current() == Choices(bf16_products="fp32")
    assert threads == 2
    assert choices_from_dict(measured.choices.to_dict()) == measured.choices
    assert len(measured.reasons) == len(measured.choices.to_dict())
    for way, reason in zip(measured.choices.to_dict().values(), measured.reasons, strict=True):
        assert reason.endswith(f"-> {way}")


@pytest.mark.parametrize(
    ("own", "other", "winner"), [(10.0, 8.0, "other"), (10.0, 9.6, "own"), (10.0, 12.0, "own"), (10.0, 0.1, "other")]
)
def test_another_way_must_be_clearly_faster(own: float, other: float, winner: str) -> None:
    assert measuring._winner({"own": own, "other": other}) == winner


def test_a_machine_without_onednns_operator_multiplies_by_mkl() -> None:
    def missing(*given: Any) -> Any:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    with patch.object(measuring.products, "onednn_product", missing):
        assert not measuring.onednn_agrees()
        contests = list(measuring._contests())
    assert [contest.ways for contest in contests[:3]] == [("mkl",)] * 3


def test_a_library_that_multiplies_wrongly_is_not_taken() -> None:
    wrong: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda x, weight: x @ weight.T + 1e-2  # noqa: E731
    with patch.object(measuring.products, "onednn_product", wrong):
        assert not measuring.onednn_agrees()
    assert measuring.onednn_agrees()
