"""A run whose samples are spread over cp trains and evaluates like a run of one process."""

from pathlib import Path

import pytest
from rank_pool import run_mesh
from tiny_run import numbers, start, start_on

from meshwright.parallel.mesh import Sizes

FP64 = ["train.precision=fp64", "data.mask_documents=true"]


@pytest.mark.parametrize(
    ("sizes", "overrides"),
    [
        pytest.param(Sizes(cp=2), ["parallel.cp=2", "zero.stage=1"], marks=pytest.mark.slow),
        pytest.param(
            Sizes(cp=2, tp=2, ep=2), ["parallel.cp=2", "parallel.tp=2", "parallel.ep=2"], marks=pytest.mark.slow
        ),
        pytest.param(
            Sizes(pp=2, cp=2),
            ["parallel.pp=2", "parallel.cp=2", 'parallel.context="ulysses"'],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_spread_samples_show_the_same_numbers(tmp_path: Path, sizes: Sizes, overrides: list[str]) -> None:
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    alone.mkdir(), spread.mkdir()
    start(alone, *FP64)
    run_mesh(sizes, start_on, spread, [*FP64, *overrides])
    for kind, names in {"step": ("loss", "grad_norm", "router_loss/z"), "evaluation": ("validation_loss",)}.items():
        for name in names:
            assert numbers(spread, name, kind) == pytest.approx(numbers(alone, name, kind), rel=1e-9), name
    assert numbers(spread, "tokens") == numbers(alone, "tokens")
    assert numbers(spread, "expert_entropy") == numbers(alone, "expert_entropy")
