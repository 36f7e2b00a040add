"""The summary is what metrics.jsonl says, and its picture is drawn on a machine without a display."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from meshwright.launcher.observe.metrics import Numbers
from meshwright.launcher.observe.sinks import open_sinks
from meshwright.launcher.observe.summary import RunFacts, draw_losses, print_summary, summarise, write_summary

FACTS = RunFacts("tiny", unigram_entropy=5.5, checkpoint="output/tiny/checkpoints/step_00000005", versions={"a": "1"})


def step(number: int, loss: float, rate: float = 100.0, *, skipped: bool = False) -> Numbers:
    seconds = 50 / rate
    return {
        "kind": "step",
        "step": number,
        "loss": loss,
        "tokens": 50,
        "seconds": seconds,
        "tokens_per_second": rate,
        "tokens_per_second_per_rank": rate,
        "mfu": rate / 1000,
        "mfu_of": "a peak",
        "memory_gib": 1.0,
        "grad_norm": 1.0,
        "skipped": skipped,
    }


def evaluation(number: int, loss: float) -> Numbers:
    return {"kind": "evaluation", "step": number, "validation_loss": loss}


RECORDS: list[Numbers] = [
    {"kind": "event", "text": "start"},
    step(1, 7.0, rate=10.0),
    step(2, 4.0),
    evaluation(2, 4.75),
    step(3, math.nan, skipped=True),
    step(4, 3.0, rate=200.0),
    step(5, 3.5),
    evaluation(5, 5.0),
]


def test_the_numbers_of_a_run_are_those_of_its_records() -> None:
    assert summarise(RECORDS, FACTS) == {
        "name": "tiny",
        "steps": 5,
        "final_loss": 3.5,
        "best_loss": 3.0,
        "best_loss_step": 4,
        "validation_loss": 5.0,
        "best_validation_loss": 4.75,
        "best_validation_loss_step": 2,
        "unigram_entropy": 5.5,
        "tokens": 250,
        "seconds": 5.0 + 3 * 0.5 + 0.25,
        "tokens_per_second_median": 100.0,
        "mfu_median": 0.1,
        "mfu_of": "a peak",
        "skipped_steps": 1,
        "checkpoint": "output/tiny/checkpoints/step_00000005",
        "versions": {"a": "1"},
    }


def test_a_run_that_was_resumed_is_summed_up_as_one(tmp_path: Path) -> None:
    with open_sinks(tmp_path, rank=0, total_steps=4) as sinks:
        for number in (1, 2, 3):
            sinks.step(step(number, 5.0))
    with open_sinks(tmp_path, rank=0, total_steps=4, resumed_at=2) as sinks:
        for number in (3, 4):
            sinks.step(step(number, 4.0))
    summary = write_summary(tmp_path, FACTS)
    assert (summary["steps"], summary["tokens"], summary["final_loss"]) == (4, 200, 4.0)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert not list(tmp_path.glob("*.new"))


def test_a_run_that_ended_in_nan_has_a_summary_in_strict_json(tmp_path: Path) -> None:
    with open_sinks(tmp_path, rank=0, total_steps=2) as sinks:
        sinks.step(step(1, 5.0))
        sinks.step(step(2, math.nan))
    assert math.isnan(write_summary(tmp_path, FACTS)["final_loss"])
    written = json.loads((tmp_path / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (written["final_loss"], written["best_loss"]) == (None, 5.0)


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    for losses in ([math.nan, 4.0, 5.0], [4.0, math.nan, 5.0], [5.0, 4.0, math.nan]):
        assert summarise([step(n, loss) for n, loss in enumerate(losses)], FACTS)["best_loss"] == 4.0


def test_a_run_without_any_step_has_a_summary_too(tmp_path: Path) -> None:
    summary = write_summary(tmp_path, RunFacts("empty"))
    assert (summary["steps"], summary["final_loss"], summary["tokens"]) == (0, None, 0)
    assert (tmp_path / "loss.png").exists()


def test_the_picture_holds_both_curves_and_the_entropy(tmp_path: Path) -> None:
    from matplotlib.image import imread

    pictures = {}
    for name, records, entropy in [("all", RECORDS, 5.5), ("no line", RECORDS, None), ("none", [], None)]:
        draw_losses(records, entropy, tmp_path / "loss.png")
        pictures[name] = imread(tmp_path / "loss.png")[..., :3]
    assert {picture.shape for picture in pictures.values()} == {(600, 960, 3)}

    def has(picture: str, color: tuple[float, float, float]) -> bool:
        return bool((abs(pictures[picture] - color).max(axis=-1) < 0.02).any())

    blue, orange, gray = (0x1F / 255, 0x77 / 255, 0xB4 / 255), (1.0, 0x7F / 255, 0x0E / 255), (0.502,) * 3
    assert has("all", blue)
    assert has("all", orange)
    assert has("all", gray)
    assert has("no line", blue)
    assert (pictures["all"] != pictures["no line"]).any()
    assert not has("none", blue)
    assert not has("none", orange)


def test_a_picture_that_cannot_be_drawn_costs_no_number(tmp_path: Path) -> None:
    (tmp_path / "loss.png").mkdir()
    summary = write_summary(tmp_path, FACTS)
    assert "IsADirectoryError" in summary["picture_problem"]
    assert "picture" not in summary
    assert json.loads((tmp_path / "summary.json").read_text())["name"] == "tiny"


def shown(records: list[Numbers], facts: RunFacts = FACTS) -> str:
    stream = io.StringIO()
    print_summary(summarise(records, facts), Console(file=stream, width=120))
    return stream.getvalue()


def test_the_final_table_says_what_was_reached() -> None:
    table = shown(RECORDS)
    assert "5, 1 skipped" in table
    assert "3.500, best 3.000 at step 4" in table
    assert "5.000, best 4.750 at step 2" in table
    assert "5.500; the validation loss is below it, by 0.500" in table
    assert "250 in 6.8 s" in table
    assert "100 tokens/s (median step)" in table
    assert "10.0% of a peak" in table
    assert "output/tiny/checkpoints/step_00000005" in table


def test_the_final_table_does_not_flatter() -> None:
    assert "the validation loss is NOT below it, by 0.500" in shown([step(1, 6.0), evaluation(1, 6.0)])
    empty = shown([], RunFacts("empty"))
    assert "0, 0 skipped" in empty
    for absent in ("loss", "entropy", "mfu", "checkpoint"):
        assert absent not in empty


def test_a_record_that_lacks_numbers_ends_no_run() -> None:
    summary = summarise([step(1, 3.0), {"kind": "step", "step": 2}], FACTS)
    assert (summary["steps"], summary["final_loss"]) == (2, 3.0)
