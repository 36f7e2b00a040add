"""What any layout saved loads into any other bit for bit, optimizer included, and the run goes on as on one process.

    two steps on layout X -> checkpoint -> layout Y        every weight, moment and buffer of every rank, bitwise;
                                |                          one more step: all of them, loss and norm, to 1e-9
                                +-> one process            what Y is held to; itself held to two steps of one process

Six pairs always, a slice of many with each commit (tests/commit_slice.py).
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
from commit_slice import check_slice
from hypothesis import strategies
from parity_samples import AXES, KEYS, Sample, sample, samples
from rank_pool import run_mesh
from resume_cases import Array, Loaded, Piece, differences, load_and_go_on, train_and_save

from meshwright.launcher.build import sizes_of
from meshwright.parallel.mesh import single_process_mesh


class Pair(NamedTuple):
    """The layout that saves, and the one that goes on."""

    before: Sample
    after: Sample

    def __str__(self) -> str:
        return f"{self.before} -> {self.after}"


# fp64 sums of a few thousand terms in another order (promise 2), as in tests/engine_cases.py.
EXACT = 1e-9

# Few micro-batches, as they take the time, and no more than two ranks where two will do.
FIXED = [
    Pair(
        sample("dense", dp_shard=2, zero__stage=3, micro_batch=4),
        sample("dense", tp=4, zero__stage=0, micro_batch=4),
    ),
    Pair(
        sample("dense-tied-biased", pp=2, tp=2, zero__stage=0, micro_batch=4),
        sample("dense-tied-biased", dp_shard=2, zero__stage=3, micro_batch=4),
    ),
    Pair(
        sample("dense-one-kv-head", cp=2, zero__stage=2, optimizer__kind="muon", micro_batch=4),
        sample("dense-one-kv-head", dp_shard=2, tp=2, zero__stage=1, optimizer__kind="muon", micro_batch=4),
    ),
    Pair(
        sample("moe", dp_shard=2, ep=2, zero__stage=3, micro_batch=4),
        sample("moe", pp=2, cp=2, etp=2, zero__stage=2, pipeline__schedule="gpipe", micro_batch=4),
    ),
    Pair(
        sample("moe-step-balance", dp_replicate=2, cp=2, etp=2, zero__stage=1, micro_batch=4),
        sample("moe-step-balance", tp=2, ep=2, zero__stage=0, micro_batch=4),
    ),
    Pair(
        sample("mixed", pp=2, pipeline__schedule="zbv", zero__stage=0, optimizer__kind="muon", micro_batch=4),
        sample(
            "mixed", pp=2, dp_replicate=2, ep=2, pipeline__schedule="interleaved_1f1b", zero__stage=1,
            optimizer__kind="muon", micro_batch=2,
        ),
    ),
]  # fmt: skip


@cache
def definition(learned: Sample) -> Loaded:
    """Return what one process ends its first steps with."""
    with TemporaryDirectory(prefix="pairs-") as folder:
        return train_and_save(single_process_mesh(), learned, Path(folder))


def learned_by(drawn: Sample) -> Sample:
    """Return one process's sample of the same model, data and optimizer."""
    kept = tuple(entry for entry in drawn.tables if entry[0] in KEYS)
    return Sample(drawn.model, 1, 4, kept)


def like(drawn: Sample, first: Sample) -> Sample:
    """Return a sample's layout with what the first one learns."""
    layout = tuple(entry for entry in drawn.tables if entry[0] not in KEYS)
    return replace(drawn, model=first.model, tables=tuple(sorted([*layout, *learned_by(first).tables])))


def wholes(pieces: dict[str, Piece]) -> dict[str, Array]:
    """Return what one process holds: global tensors."""
    return {name: piece.values for name, piece in pieces.items()}


def assert_goes_on(pair: Pair) -> None:
    before, after = pair
    with TemporaryDirectory(prefix="pairs-") as name:
        folder = Path(name)
        run_mesh(sizes_of(before.run_file(), before.world), train_and_save, before, folder)
        one = load_and_go_on(single_process_mesh(), learned_by(before), folder)
        ranks = run_mesh(sizes_of(after.run_file(), after.world), load_and_go_on, after, folder)
    trained = definition(learned_by(before))
    assert differences([one.loaded], wholes(trained.loaded), tolerance=EXACT) == [], "the checkpoint"
    assert differences([rank.loaded for rank in ranks], wholes(one.loaded)) == [], "as loaded"
    for rank in ranks:
        assert rank.losses == pytest.approx(one.losses, rel=EXACT)
        assert rank.norms == pytest.approx(one.norms, rel=EXACT)
    assert differences([rank.later for rank in ranks], wholes(one.later), tolerance=EXACT) == [], "a step later"


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=[] if at in (0, 1, 3) else pytest.mark.slow) for at, pair in enumerate(FIXED)],
    ids=str,
)
def test_a_fixed_pair_of_layouts_loads_bit_for_bit_and_goes_on(pair: Pair) -> None:
    assert_goes_on(pair)


def test_the_fixed_pairs_have_every_axis_and_every_stage_on_both_sides() -> None:
    assert [problem for pair in FIXED for drawn in pair for problem in drawn.problems()] == []
    assert all(like(after, before).tables == tuple(sorted(after.tables)) for before, after in FIXED)
    assert all(before.world != after.world for before, after in FIXED)
    for side in zip(*FIXED, strict=True):
        assert {axis for drawn in side for axis in AXES if drawn.has(axis)} == set(AXES)
        assert {drawn.run_file().zero.stage for drawn in side} == {0, 1, 2, 3}
    assert {before.run_file().optimizer.kind for before, _ in FIXED} == {"adamw", "muon"}


def is_sound(pair: Pair) -> bool:
    """Say whether both layouts can run, and differ."""
    before, after = pair
    if before.problems() or after.problems():
        return False
    return sizes_of(before.run_file(), before.world) != sizes_of(after.run_file(), after.world)


@pytest.mark.slow
def test_sampled_pairs_of_layouts_load_bit_for_bit_and_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    # What is recomputed is in no checkpoint.
    layouts = samples(("parallel", "zero", "pipeline"))
    pairs = strategies.tuples(layouts, layouts).map(lambda drawn: Pair(drawn[0], like(drawn[1], drawn[0])))
    passed = check_slice("pairs of layouts", 10, pairs, capfd, is_sound=is_sound, check=assert_goes_on)
    for side in zip(*passed, strict=True):
        assert len({axis for drawn in side for axis in AXES if drawn.has(axis)}) >= 3, "the slice must not be trivial"
