"""A run whose model is split into stages trains, evaluates, stops, saves and goes on like a run of one process."""

from pathlib import Path

import pytest
from rank_pool import run_mesh
from tiny_run import numbers, start, start_on, tiny_store

from meshwright.parallel.mesh import Sizes

TWO = Sizes(pp=2)
FP64 = ["train.precision=fp64", "run.timeout_seconds=60", "train.global_batch_size=8"]


def test_two_stages_train_and_evaluate_like_one_process(tmp_path: Path) -> None:
    tiny_store()
    alone, split = tmp_path / "alone", tmp_path / "split"
    alone.mkdir(), split.mkdir()
    start(alone, *FP64)
    run_mesh(TWO, start_on, split, [*FP64, "parallel.pp=2"])
    for name in ("loss", "grad_norm"):
        assert numbers(split, name) == pytest.approx(numbers(alone, name), rel=1e-9)
    assert numbers(split, "validation_loss", "evaluation") == pytest.approx(
        numbers(alone, "validation_loss", "evaluation"), rel=1e-9
    )
