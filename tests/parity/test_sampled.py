"""Layouts by hand and by chance compute what one process computes: 12 always, a slice of many with each commit.

How the slice is drawn, and how to ask for another: tests/commit_slice.py.
"""

from collections.abc import Callable
from functools import cache
from itertools import combinations

import pytest
from commit_slice import check_slice
from engine_cases import Samples, Trace, assert_same, train
from parity_samples import AXES, MODELS, Sample, sample, samples
from rank_pool import run_mesh

from meshwright.launcher.build import plan_of, sizes_of
from meshwright.launcher.runfile.tables import OptimizerConfig, RunFile
from meshwright.launcher.stages import stages_of
from meshwright.parallel.apply import Plan
from meshwright.parallel.config import ZERO_BUBBLE
from meshwright.parallel.mesh import Mesh, single_process_mesh

FIXED = [
    sample("dense", dp_replicate=2, dp_shard=2, zero__stage=2, micro_batch=2),
    sample("dense-tied-biased", dp_shard=2, tp=2, zero__stage=3, recompute__mode="full"),
    sample("dense-one-kv-head", dp_replicate=2, tp=2, zero__stage=1, recompute__mode="selective"),
    sample("dense-tied-biased", pp=2, dp_shard=2, zero__stage=2, data__mask_documents=True, micro_batch=2),
    sample("dense", pp=2, tp=2, pipeline__schedule="interleaved_1f1b", recompute__mode="full", micro_batch=4),
    sample("dense-one-kv-head", cp=2, tp=2, zero__stage=3),
    sample("dense-tied-biased", pp=2, cp=2, context="ulysses", zero__stage=1, micro_batch=2),
    sample("moe-draws-and-drops", dp_shard=2, tp=2, ep=2, etp=2, zero__stage=1, recompute__mode="full"),
    sample("mixed", dp_replicate=2, cp=2, ep=2, etp=2, zero__stage=2, optimizer__kind="muon", micro_batch=2),
    sample("moe-step-balance", pp=2, dp_replicate=2, ep=2, zero__stage=0, pipeline__schedule="gpipe", micro_batch=2),
    sample("moe-draws-and-drops", dp_shard=2, cp=2, ep=2, zero__stage=3, recompute__mode="selective"),
    sample(
        "mixed",
        pp=2,
        tp=2,
        etp=2,
        zero__stage=1,
        pipeline__schedule="zbv",
        recompute__mode="modules",
        optimizer__kind="muon",
        micro_batch=4,
    ),
]


@cache
def definition(model: str, mask_documents: bool, muon: OptimizerConfig | None) -> Trace:
    samples_of_run = Samples(mask_documents=mask_documents)
    return train(single_process_mesh(), MODELS[model], Plan(), micro_batch=2, samples=samples_of_run, muon=muon)


def muon_of(drawn: Sample) -> OptimizerConfig | None:
    """Return the table [optimizer] if it asks for Muon; the cases' AdamW is torch's."""
    table = drawn.run_file().optimizer
    return table if table.kind == "muon" else None


def case(mesh: Mesh, drawn: Sample) -> Trace:
    run_file = drawn.run_file()
    return train(
        mesh,
        run_file.model,
        plan_of(run_file),
        micro_batch=drawn.micro_batch,
        stages=stages_of(run_file),
        samples=Samples(run_file.parallel.context, run_file.data.mask_documents),
        muon=muon_of(drawn),
    )


def assert_like_one_process(drawn: Sample) -> None:
    expected = definition(drawn.model, drawn.run_file().data.mask_documents, muon_of(drawn))
    for trace in run_mesh(sizes_of(drawn.run_file(), drawn.world), case, drawn):
        assert_same(trace, expected)


@pytest.mark.parametrize("drawn", FIXED, ids=str)
def test_a_fixed_layout_computes_what_one_process_computes(drawn: Sample) -> None:
    assert_like_one_process(drawn)


def test_the_fixed_layouts_are_twelve_sound_ones_with_every_pair_of_axes() -> None:
    assert len(FIXED) == 12
    assert [problem for drawn in FIXED for problem in drawn.problems()] == []
    together = {pair for drawn in FIXED for pair in combinations([axis for axis in AXES if drawn.has(axis)], 2)}
    assert set(combinations(AXES, 2)) - together == set()


# Each of these must stand among the twelve.
CHOICES: dict[str, Callable[[RunFile], object]] = {
    **{f"zero.stage {stage}": lambda run, stage=stage: run.zero.stage == stage for stage in range(4)},
    "one stage on a rank, in turn": lambda run: run.parallel.pp > 1 and run.pipeline.schedule == "1f1b",
    "interleaved stages": lambda run: run.parallel.pp > 1 and run.pipeline.schedule == "interleaved_1f1b",
    "backwards taken apart": lambda run: run.parallel.pp > 1 and run.pipeline.schedule in ZERO_BUBBLE,
    **{
        f"recompute.mode {mode}": lambda run, mode=mode: run.recompute.mode == mode
        for mode in ("none", "full", "selective", "modules")
    },
    "dropout over several ranks of a sample": lambda run: run.model.residual_dropout and run.parallel.cp > 1,
    "dropout that is drawn again": lambda run: run.model.residual_dropout and run.recompute.mode == "full",
    "router jitter": lambda run: run.model.moe and run.model.moe.router_jitter,
    "a capacity": lambda run: run.model.moe and run.model.moe.capacity_factor,
    **{way: lambda run, way=way: run.parallel.cp > 1 and run.parallel.context == way for way in ("ring", "ulysses")},
    "copies of sharded state": lambda run: run.parallel.dp_replicate > 1 and run.zero.stage >= 1,
    "parts of an expert": lambda run: run.parallel.etp > 1,
    "documents": lambda run: run.data.mask_documents,
    "Muon": lambda run: run.optimizer.kind == "muon",
    "dense and MoE layers": lambda run: 0 < run.model.num_moe_layers < run.model.num_layers,
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_fixed_layouts_have_every_choice(choice: str) -> None:
    assert any(CHOICES[choice](drawn.run_file()) for drawn in FIXED)


@pytest.mark.slow
def test_sampled_layouts_compute_what_one_process_computes(capfd: pytest.CaptureFixture[str]) -> None:
    passed = check_slice(
        "layouts", 24, samples(), capfd, is_sound=lambda drawn: not drawn.problems(), check=assert_like_one_process
    )
    assert len({axis for drawn in passed for axis in AXES if drawn.has(axis)}) >= 4, "the slice must not be trivial"
