"""What a pipeline asks of the rest of a run file is told with what would fit; and that does fit."""

import re

import pytest

from meshwright.launcher.runfile.cross_checks import check, check_on_any_world
from meshwright.launcher.runfile.read import examine
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.stages import forward_costs, layers_of_stages, stage_costs, stages_of
from meshwright.parallel.config import ZERO_BUBBLE

ALL = ["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]


def run_file(*overrides: str) -> RunFile:
    tables = {
        "run": {"name": "x"},
        "model": {"preset": "dense-tiny", "num_layers": 8, "vocab_size": 320},
        "data": {"store": "s", "seq_len": 64},
        "train": {"steps": 100, "global_batch_size": 32},
        "learning_rate": {"peak": 1e-3},
    }
    made, problems = examine(tables, overrides)
    assert made is not None, problems
    return made


@pytest.mark.parametrize("schedule", ALL)
def test_every_schedule_is_accepted_on_a_sound_run(schedule: str) -> None:
    run = run_file("parallel.pp=4", f"pipeline.schedule={schedule}", "zero.stage=2", "train.compile=false")
    assert check(run, 8) == []


def test_a_pipeline_table_without_a_pipeline_is_left_alone() -> None:
    run = run_file("pipeline.schedule=zbv", "pipeline.stages_per_rank=2", "zero.stage=3", "train.global_batch_size=7")
    assert check(run, 1) == []


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["parallel.pp=16"],
            "parallel.pp = 16: makes 16 stages, and model.num_layers = 8 gives each at least one layer;"
            " one of [1, 2, 4, 8] would fit",
        ),
        (
            ["parallel.pp=8", "pipeline.schedule=interleaved_1f1b"],
            "parallel.pp = 8: makes 16 stages (2 on each rank), and model.num_layers = 8 gives each at least one"
            ' layer; one of [1, 2, 4], or pipeline.schedule = "1f1b", would fit',
        ),
        (
            ["parallel.pp=2", "pipeline.stages_per_rank=2"],
            'pipeline.stages_per_rank = 2: pipeline.schedule = "1f1b" holds one stage on a rank;'
            ' 1, or schedule "interleaved_1f1b", would fit',
        ),
        (
            ["parallel.pp=2", "pipeline.schedule=zbv", "pipeline.stages_per_rank=3"],
            'pipeline.stages_per_rank = 3: pipeline.schedule = "zbv" holds two stages on a rank; 2 or 0 would fit',
        ),
        (
            ["parallel.pp=2", "pipeline.schedule=zbv", "zero.stage=3"],
            'zero.stage = 3: would gather weights for each part of the backward, and pipeline.schedule = "zbv" takes'
            ' backwards apart; 0, 1 or 2, or schedule "1f1b", "gpipe" or "interleaved_1f1b", would fit',
        ),
        (
            ["parallel.pp=2", "pipeline.schedule=dualpipev", "recompute.mode=full"],
            'recompute.mode = "full": would recompute a layer many times over, and pipeline.schedule = "dualpipev"'
            ' takes backwards apart; "none", "modules" with "norm" and "activation", or schedule "1f1b", "gpipe" or'
            ' "interleaved_1f1b", would fit',
        ),
        (
            ["parallel.pp=2", "pipeline.schedule=zbv", "model.multi_token.depth=1", "model.tie_embeddings=true"],
            "model.tie_embeddings = true: would use one matrix before and behind the layers of [model.multi_token], and"
            ' pipeline.schedule = "zbv" takes backwards apart; false, or schedule "1f1b", "gpipe" or'
            ' "interleaved_1f1b", would fit',
        ),
        (
            ["parallel.pp=2", "pipeline.schedule=interleaved_zero_bubble", "train.precision=bf16"],
            'train.precision = "bf16": would add up the gradients of micro-batches in bf16, and pipeline.schedule ='
            ' "interleaved_zero_bubble" takes backwards apart; "bf16_autocast", or schedule "1f1b", "gpipe" or'
            ' "interleaved_1f1b", would fit',
        ),
        (
            ["parallel.pp=4", "train.micro_batch_size=3"],
            "train.global_batch_size = 32: leaves 16 samples on a rank, which train.micro_batch_size = 3 does not"
            ' divide; pipeline.schedule = "1f1b" takes at least 4, of one size; one of [30, 36], or'
            " train.micro_batch_size = 4, would fit",
        ),
        (
            ["parallel.pp=4", "train.micro_batch_size=8"],
            "train.global_batch_size = 32: leaves 2 micro-batches of 8 on a rank; pipeline.schedule ="
            ' "1f1b" takes at least 4, of one size; one of [64], or train.micro_batch_size = 4, would fit',
        ),
        (
            ["parallel.pp=4", "train.batch_ramp=[{samples=64, global_batch_size=4}]"],
            "train.batch_ramp[0].global_batch_size = 4: leaves 2 micro-batches of 1 on a rank; pipeline.schedule ="
            ' "1f1b" takes at least 4, of one size; one of [8] would fit',
        ),
        (
            ["parallel.pp=4", "pipeline.schedule=interleaved_1f1b", "train.global_batch_size=22"],
            "train.global_batch_size = 22: leaves 11 micro-batches of 1 on a rank; pipeline.schedule ="
            ' "interleaved_1f1b" takes at least 4, in rounds of one length that is at least 4, of one size; one of'
            " [20, 24] would fit",
        ),
    ],
)
def test_what_a_pipeline_cannot_take_is_told(overrides: list[str], line: str) -> None:
    assert check(run_file(*overrides), 8 if "parallel.pp=4" in overrides else 16) == [line]


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_a_batch_or_a_micro_batch_that_is_said_to_fit_fits(schedule: str, micro_batch_size: int) -> None:
    told = 0
    for size in (*range(2, 60, 6), 3, 13, 31):  # the last three do not even divide by the data-parallel ranks
        overrides = ["parallel.pp=4", f"pipeline.schedule={schedule}", f"train.micro_batch_size={micro_batch_size}"]
        for line in check(run_file(*overrides, f"train.global_batch_size={size}"), 8):
            told += 1
            listed = line.partition("one of [")[2].partition("]")[0]
            assert listed
            for fit in re.findall(r"\d+", listed):
                assert check(run_file(*overrides, f"train.global_batch_size={fit}"), 8) == []
            at_once = re.search(r"train.micro_batch_size = (\d+), would fit", line)
            if at_once:
                changed = [f"train.global_batch_size={size}", f"train.micro_batch_size={at_once[1]}"]
                assert check(run_file(*overrides, *changed), 8) == []
    assert told or (schedule == "gpipe" and micro_batch_size == 1)


def test_all_that_a_split_backward_forbids_is_told_at_once_and_without_a_world() -> None:
    wrong = ["zero.stage=3", "recompute.mode=full", "train.compile=true", "train.precision=bf16"]
    for schedule in ZERO_BUBBLE:
        found = check_on_any_world(run_file("parallel.pp=2", f"pipeline.schedule={schedule}", *wrong))
        keys = {line.partition(" =")[0] for line in found}
        assert {"zero.stage", "recompute.mode", "train.compile", "train.precision"} == keys


def test_stages_are_cut_with_the_embedding_counted() -> None:
    """With one id the output costs as much as the embedding: of equal cuts the last stage then begins first."""
    run = run_file("parallel.pp=2", "model.num_layers=3", "model.vocab_size=1")
    assert [len(stage) for stage in layers_of_stages(run)] == [1, 2]
    (layer, *_), embedding, output = forward_costs(run.model, run.data.seq_len)
    assert embedding == output == 2 * run.model.hidden_size
    assert stage_costs(run) == (layer + embedding, 2 * layer + output)


def test_stages_are_cut_with_the_output_counted() -> None:
    small, large = (layers_of_stages(run_file("parallel.pp=4", f"model.vocab_size={v}")) for v in (10, 100_000))
    assert [len(stage) for stage in small] == [2, 2, 2, 2]
    assert [len(stage) for stage in large][-1] == 1  # the output alone costs more than the layers together
    costs = stage_costs(run_file("parallel.pp=4", "model.vocab_size=10"))
    assert max(costs) < 1.1 * min(costs)
    assert stages_of(run_file()).count == 1
