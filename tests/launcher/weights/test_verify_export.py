"""The verification finds what is wrong with an export, names the figure, and excuses nothing but a near tie."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import (
    CONFIGS,
    MOE,
    ModelWeights,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    tiny_tokens,
    write_tiny_export,
)
from torch import Tensor

from meshwright.launcher.weights.export_report import ExportReport, write_report
from meshwright.launcher.weights.verify_export import (
    Choice,
    VerificationText,
    compare_logits,
    judge_choices,
    round_weights,
    rounding_effect,
    verify_export,
)
from meshwright.model.config import ModelConfig

pytest.importorskip("transformers")
NAME = "mixtral"


def verified_after(
    folder: Path, damage: Callable[[Path], None], dtype: str = "fp32", config: ModelConfig = CONFIGS[NAME]
) -> ExportReport:
    """Export a tiny Mixtral, damage the folder, and verify it."""
    model = tiny_model(config)
    write_tiny_export(folder, model, config, dtype=dtype)
    damage(folder)
    text = VerificationText(tiny_tokens(), "a test", tiny_tokenizer())
    return verify_export(folder, config, ModelWeights(model), model, text, dtype=dtype, new_tokens=4)


def change_tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def change_config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def swap_gate_and_up(tensors: dict[str, Tensor]) -> None:
    expert = "model.layers.1.block_sparse_moe.experts.2"
    tensors[f"{expert}.w1.weight"], tensors[f"{expert}.w3.weight"] = (
        tensors[f"{expert}.w3.weight"],
        tensors[f"{expert}.w1.weight"],
    )


def test_swapped_matrices_are_found_in_the_tensors_and_in_the_logits(tmp_path: Path) -> None:
    failures = verified_after(tmp_path, change_tensors(swap_gate_and_up)).failures()
    assert "2 tensors were changed on the way" in failures[0]
    assert "experts.2.w1.weight" in failures[0]
    assert failures[1].startswith("the largest difference of logits is ")


def test_a_missing_tensor_is_found(tmp_path: Path) -> None:
    report = verified_after(tmp_path, change_tensors(lambda tensors: tensors.pop("model.norm.weight")))
    assert report.tensors.missing == ["model.norm.weight"]
    assert report.tensors.not_loaded == ["model.norm.weight"]
    assert "1 tensors are missing from the files: model.norm.weight" in report.failures()


def test_a_tensor_too_many_is_found(tmp_path: Path) -> None:
    report = verified_after(tmp_path, change_tensors(lambda tensors: tensors.update(extra=torch.ones(2))))
    assert report.tensors.left_over == ["extra"]
    assert "1 tensors are in the files and not of the class: extra" in report.failures()


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 100.0, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"rms_norm_eps": 0.1},
        {"num_experts_per_tok": 1},
        {"hidden_act": "gelu"},
    ],
)
def test_a_config_that_computes_otherwise_is_found_in_the_logits(changes: dict[str, object], tmp_path: Path) -> None:
    report = verified_after(tmp_path, change_config(**changes))
    assert report.tensors.changed == []
    assert report.logits.max_difference > report.logits.limit
    assert any("allowed are" in failure for failure in report.failures())


def test_experts_of_any_width_are_verified(tmp_path: Path) -> None:
    """The grouped product, which is the class's default, takes no rows of 24 bytes."""
    config = tiny_config(pattern="*E", moe=MOE.model_copy(update={"expert_hidden_size": 6}))
    assert verified_after(tmp_path, lambda folder: None, config=config).failures() == []


def test_another_tokenizer_is_found(tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][1:]
        path.write_text(json.dumps(tokenizer))

    report = verified_after(tmp_path, damage)
    assert report.failures() == ["the exported tokenizer encodes 2 samples otherwise"]


def test_bf16_is_exact_against_rounded_weights_and_tells_what_rounding_costs(tmp_path: Path) -> None:
    config = CONFIGS[NAME]
    model = tiny_model(config)
    write_tiny_export(tmp_path, model, config, dtype="bf16")
    source, tokens = ModelWeights(tiny_model(config)), tiny_tokens()
    with torch.no_grad():
        before = model(tokens)
        round_weights(model, torch.bfloat16)
        after = model(tokens)
    text = VerificationText(tokens, "a test", tiny_tokenizer())
    report = verify_export(tmp_path, config, source, model, text, dtype="bf16", new_tokens=4)
    assert report.failures() == []
    effect = rounding_effect(before, after, tokens)
    assert effect["largest difference of logits"] > 10 * report.logits.max_difference
    assert 0 < effect["mean change of the loss, absolute"] < 0.1


def test_bf16_without_rounding_our_side_fails(tmp_path: Path) -> None:
    assert verified_after(tmp_path, lambda folder: None, dtype="bf16").logits.max_difference > 1e-3


def test_a_choice_at_a_near_tie_is_excused_and_listed_and_any_other_is_not() -> None:
    choices = [Choice("a", 1, 1, 0.0), Choice("b", 1, 2, 0.019), Choice("c", 3, 4, 0.021), Choice("d", 3, 3, 9.0)]
    greedy = judge_choices(choices, max_difference=0.01)
    assert (greedy.compared, greedy.excused, greedy.wrong) == (4, 1, 1)
    assert [(it.where, it.excused) for it in greedy.differences] == [("c", False), ("b", True)]


def test_the_limit_grows_with_the_largest_logit_above_one() -> None:
    tokens = torch.zeros(3, 1, dtype=torch.int64)
    small, large = torch.zeros(3, 1, 4), torch.zeros(3, 1, 4)
    small[0, 0, 0], large[0, 0, 0] = 0.5, -50.0
    assert compare_logits(lambda _: small, lambda _: small, tokens)[0].limit == pytest.approx(1e-4)
    assert compare_logits(lambda _: large, lambda _: large, tokens)[0].limit == pytest.approx(5e-3)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_fail(broken: float, tmp_path: Path) -> None:
    def nan_in_the_norm(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][3] = broken

    report = verified_after(tmp_path, change_tensors(nan_in_the_norm))
    assert not report.logits.finite
    assert "logits are not finite" in report.failures()


def test_the_report_lies_beside_the_files_for_programs_and_people(tmp_path: Path) -> None:
    report = verified_after(tmp_path, change_tensors(swap_gate_and_up))
    write_report(tmp_path, report, {"source": "output/x"})
    content = json.loads((tmp_path / "export_report.json").read_text())
    assert (content["verified"], content["passed"]) == (True, False)
    assert content["failures"] == report.failures()
    assert content["logits"]["max_difference"] == report.logits.max_difference
    page = (tmp_path / "export_report.md").read_text()
    assert page.startswith("# Export: FAILED")
    assert "output/x" in page


def test_a_skipped_verification_says_so(tmp_path: Path) -> None:
    write_report(tmp_path, None, {"source": "output/x"})
    content = json.loads((tmp_path / "export_report.json").read_text())
    assert (content["verified"], content["passed"]) == (False, None)
    assert "not verified" in (tmp_path / "export_report.md").read_text()
