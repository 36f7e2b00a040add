"""When a run goes on: layout and length may change, learning on request, the model and the data's order never."""

from typing import Any

import pytest

from meshwright.launcher.runfile.keys import all_keys
from meshwright.launcher.runfile.read import examine
from meshwright.launcher.runfile.resume_rules import Change, compare_for_resume
from meshwright.launcher.runfile.tables import RunFile

SOUND: dict[str, Any] = {
    "run": {"name": "x"},
    "model": {"preset": "moe-tiny"},
    "data": {"store": "s", "seq_len": 64},
    "train": {"steps": 100, "global_batch_size": 24},
    "learning_rate": {"peak": 1e-3},
}


def run_file(*overrides: str) -> RunFile:
    made, problems = examine(SOUND, overrides)
    assert made is not None, problems
    return made


def compare(*overrides: str, allow: tuple[str, ...] = ()) -> tuple[list[Change], list[str]]:
    return compare_for_resume(run_file(), run_file(*overrides), allow)


def test_nothing_changed_is_nothing_to_tell() -> None:
    assert compare() == ([], [])


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("parallel.ep=2", Change("parallel.ep", 1, 2)),
        ("zero.stage=3", Change("zero.stage", 0, 3)),
        ("recompute.mode=full", Change("recompute.mode", "none", "full")),
        ("train.micro_batch_size=2", Change("train.micro_batch_size", 1, 2)),
        ("train.compile=true", Change("train.compile", False, True)),
        ("train.threads=1", Change("train.threads", 0, 1)),
        ("train.steps=200", Change("train.steps", 100, 200)),
        ("log.every=2", Change("log.every", 1, 2)),
        ("checkpoint.keep_last=5", Change("checkpoint.keep_last", 2, 5)),
        ("evaluation.every=5", Change("evaluation.every", 0, 5)),
        ("run.name=y", Change("run.name", "x", "y")),
        ("run.folder=f", Change("run.folder", "", "f")),
        ("run.device=cpu", Change("run.device", "auto", "cpu")),
        ("run.timeout_seconds=60", Change("run.timeout_seconds", 600, 60)),
        ("data.prefetch=4", Change("data.prefetch", 2, 4)),
    ],
)
def test_layout_length_and_logging_change_freely_and_are_recorded(override: str, change: Change) -> None:
    assert compare(override) == ([change], [])


def test_weights_are_offered_only_to_a_model_that_they_fit() -> None:
    assert "branch" in compare("model.moe.top_k=1")[1][0]
    assert compare("model.num_layers=4")[1][0].endswith("or begin a run of another name, from new weights")


def test_a_size_that_follows_from_another_is_not_told() -> None:
    told = compare("model.hidden_size=256")[1]
    assert [line.partition(" =")[0] for line in told] == ["model.hidden_size"]
    told = compare("model.hidden_size=256", "model.head_dim=32")[1]
    assert [line.partition(" =")[0] for line in told] == ["model.hidden_size", "model.head_dim"]


@pytest.mark.parametrize("override", ["run.seed=1", "data.seq_len=32", "model.num_layers=4", "model.moe.top_k=1"])
def test_model_seed_and_data_order_never_change(override: str) -> None:
    key, _, value = override.partition("=")
    changes, problems = compare(override, allow=(key,))
    assert changes == []
    assert problems[0].startswith(f"--allow-change {key}: may never change when a run goes on")
    assert problems[1].startswith(f"{key} = {value}: the checkpoint has")


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("learning_rate.peak=0.01", Change("learning_rate.peak", 0.001, 0.01)),
        ("optimizer.weight_decay=0.0", Change("optimizer.weight_decay", 0.1, 0.0)),
        ("train.global_batch_size=12", Change("train.global_batch_size", 24, 12)),
        ("train.precision=bf16", Change("train.precision", "fp32", "bf16")),
        ("data.store=t", Change("data.store", "s", "t")),
    ],
)
def test_what_is_learned_changes_on_request_only(override: str, change: Change) -> None:
    changes, problems = compare(override)
    assert changes == []
    assert len(problems) == 1
    assert problems[0].endswith(f"--allow-change {change.key} takes the new value")
    assert compare(override, allow=(change.key,)) == ([change], [])


def test_a_request_may_stay_when_nothing_changes_any_more() -> None:
    assert compare(allow=("learning_rate.peak",)) == ([], [])


def test_a_request_for_a_key_that_does_not_exist_is_told() -> None:
    assert compare(allow=("train.step",))[1] == ["--allow-change train.step: no such key; did you mean train.steps?"]


def test_a_vocabulary_taken_from_the_tokenizer_is_the_same_one() -> None:
    assert compare("model.vocab_size=512") == ([], [])
    changes, problems = compare_for_resume(run_file("model.vocab_size=512"), run_file("model.vocab_size=576"))
    assert (len(changes), len(problems)) == (0, 1)


def test_the_name_of_a_preset_is_no_change_if_its_keys_are_the_same() -> None:
    named = run_file()
    unnamed = named.model_copy(update={"model": named.model.model_copy(update={"preset": ""})})
    assert compare_for_resume(named, unnamed) == ([], [])


def test_experts_that_are_left_out_are_told() -> None:
    _, problems = compare("model.preset=dense-tiny")
    assert any(line.startswith("model.moe.num_experts: is left out; the checkpoint has 4") for line in problems)


def test_every_change_prints_as_a_line() -> None:
    assert str(compare("train.steps=200")[0][0]) == "train.steps: 100 -> 200"


def test_a_new_key_is_not_free_unless_someone_says_so() -> None:
    """A key added to [data] or [model] later must not slip through: the tables that are free are few and named."""
    free = {key for key in all_keys() if key.split(".")[0] in ("data", "model", "optimizer", "learning_rate", "init")}
    for key in free - {"data.prefetch"}:
        from meshwright.launcher.runfile.resume_rules import _rule

        assert _rule(key) != "free"
