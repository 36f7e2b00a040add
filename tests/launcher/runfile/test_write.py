"""A resolved run file reads back equal, whatever is in it."""

import tomllib

import pytest

from meshwright.launcher.runfile.read import examine
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.runfile.write import as_tables, write_resolved

ODD_TEXT = 'a "quoted" \\ path \n\t\x7f\x01 with é and \U0001f600'


def run_file(*overrides: str, store: str = "s") -> RunFile:
    tables = {
        "run": {"name": "x"},
        "model": {"preset": "dense-tiny"},
        "data": {"store": store, "seq_len": 64},
        "train": {"steps": 100, "global_batch_size": 24},
        "learning_rate": {"peak": 1e-3},
    }
    made, problems = examine(tables, overrides)
    assert made is not None, problems
    return made


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.preset=moe-tiny", "parallel.ep=2", "zero.stage=3"],
        ["model.preset=qwen3-30b-a3b", "model.moe.num_experts=16"],
        ["train.batch_ramp=[{samples=5,global_batch_size=8},{samples=9,global_batch_size=16}]"],
        [
            'model.bias=["q","ffn"]',
            "optimizer.eps=1e-12",
            "learning_rate.peak=1",
            "init.from=a/b",
            "train.compile=true",
        ],
    ],
)
def test_what_is_written_reads_back_equal(overrides: list[str]) -> None:
    made = run_file(*overrides)
    again, problems = examine(tomllib.loads(write_resolved(made)))
    assert problems == []
    assert again == made


def test_text_of_any_kind_reads_back_equal() -> None:
    made = run_file(store=ODD_TEXT)
    assert tomllib.loads(write_resolved(made))["data"]["store"] == ODD_TEXT


def test_presets_and_defaults_are_written_out() -> None:
    text = write_resolved(run_file())
    for line in ("hidden_size = 64", "head_dim = 16", "betas = [0.9, 0.95]", 'from = ""', "[recompute]"):
        assert line in text.splitlines()


def test_a_dense_model_has_no_table_of_experts() -> None:
    assert "moe" not in as_tables(run_file())["model"]
    assert "[model.moe]" not in write_resolved(run_file())
