"""The ranks of a proof cut their work as large runs do: several buckets, chunks and exchanges on every small layout."""

from pathlib import Path

import pytest
import torch
from rank_pool import run_mesh

from meshwright.launcher.build import Run
from meshwright.launcher.proof.cutting import narrow_limits
from meshwright.launcher.proof.narrow import on_layout
from meshwright.launcher.proof.passes import build
from meshwright.launcher.proof.prove import plan_proof
from meshwright.launcher.runfile.read import read_run_file
from meshwright.launcher.runfile.tables import RunFile
from meshwright.parallel.mesh import Mesh, Sizes
from meshwright.parallel.zero.buckets import BucketEngine

RUNS = Path(__file__).resolve().parents[3] / "runs"
MUON = 'optimizer.kind="muon"'


def small(name: str, keys: list[str], world: int) -> tuple[RunFile, list[Sizes]]:
    plan = plan_proof(read_run_file(RUNS / name, keys, world_size=world), world)
    return plan.narrowed.run_file, list(plan.cover.layouts)


def cuts_of(mesh: Mesh, run_file: RunFile) -> tuple[list[int], list[int], list[int]]:
    """Return how many parameters each bucket has, and how many matrices each of Muon's exchanges, this rank's last."""
    run: Run = build(run_file, "fp64", mesh, is_cut=True)
    engines = [engine for engine in run.engine._engines if isinstance(engine, BucketEngine)]
    batches = run.optimizer._muon._batches
    return (
        [len(bucket.slots) for engine in engines for bucket in engine.buckets],
        [len(batch.matrices) for batch in batches],
        [len(batch.work.mine) for batch in batches],
    )


@pytest.mark.parametrize(
    ("name", "world", "keys"),
    [
        ("moe_tiny.toml", 2, []),
        ("dense_tiny.toml", 2, []),
        pytest.param("dense_tiny.toml", 8, ["parallel.tp=2", "parallel.cp=2"], marks=pytest.mark.slow),
        pytest.param("dense_tiny.toml", 8, ["parallel.pp=2", "parallel.tp=4"], marks=pytest.mark.slow),
        pytest.param("moe_tiny.toml", 8, ["parallel.ep=8"], marks=pytest.mark.slow),
    ],
)
def test_there_are_several_buckets_and_exchanges_some_with_several_members(
    name: str, world: int, keys: list[str]
) -> None:
    run_file, layouts = small(name, [MUON, *keys], world)
    for sizes in layouts:
        for buckets, exchanges, mine in run_mesh(sizes, cuts_of, on_layout(run_file, sizes)):
            assert len(buckets) >= 3
            assert max(buckets) > 1
            assert len(exchanges) >= 2
            assert max(exchanges) > 1
            assert max(mine) >= 1


@pytest.mark.parametrize("name", sorted(path.name for path in RUNS.glob("*.toml")))
@pytest.mark.parametrize("world", [8, 64])
def test_a_micro_batch_is_at_least_three_chunks_of_the_loss(name: str, world: int) -> None:
    run_file, layouts = small(name, ["train.global_batch_size=1024", "train.batch_ramp=[]"], world)
    vocab_size = run_file.model.vocab_size or 64
    for sizes in layouts:
        table = on_layout(run_file, sizes)
        table = table.model_copy(update={"model": table.model.with_vocab(vocab_size)})
        limits, rows = narrow_limits(table), -(-vocab_size // sizes.tp)
        tokens = table.data.seq_len // sizes.cp * table.train.micro_batch_size
        chunk = max(1, limits.logits(torch.device("cpu").type) // rows)
        assert -(-tokens // chunk) >= 3
        assert limits.factors("cpu") < tokens // sizes.tp * table.model.hidden_size
