"""Single ranks of 64 and of 1,024: the mesh, the model's part and its state are those that the run file predicts.

torch's fake process group gives a process a rank among as many as asked for; nothing is sent. Models are on the meta
device, so that a rank of a model of 30 billion weights is looked at in a second. The sizes divide, so that what
launcher/runfile/footprint.py gives as an average is exact on each rank.
"""

import multiprocessing
import resource
import time
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from runfile_cases import run_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from meshwright.launcher.build import plan_of, sizes_of
from meshwright.launcher.runfile.cross_checks import check
from meshwright.launcher.runfile.footprint import StateBytes, held_weights, state_bytes
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.stages import layers_held, stages_of
from meshwright.model.parts import build_model
from meshwright.model.stage import HeldStages, stage_parts
from meshwright.parallel.mesh import build_mesh
from meshwright.parallel.placement import placement_table
from meshwright.parallel.zero.engine import Reductions, shard

MOE = {"preset": "qwen3-30b-a3b", "vocab_size": 151936}
DENSE = {"preset": "llama3-8b", "vocab_size": 128256}
LAYOUTS = {
    "64, dense": (64, DENSE, {"dp_replicate": 2, "tp": 8}),
    "64, dense, pipeline": (64, DENSE, {"pp": 4, "tp": 4}),
    "64, moe": (64, MOE, {"tp": 4, "ep": 8, "etp": 2}),
    "1024, dense": (1024, DENSE, {"pp": 4, "dp_replicate": 4, "tp": 8}),
    "1024, moe": (1024, MOE, {"pp": 8, "dp_replicate": 2, "tp": 8, "ep": 16}),
}


class Seen(NamedTuple):
    """What one rank of many has and holds, in bytes and numbers."""

    axes: dict[str, tuple[int, ...]]
    weights: tuple[int, int]
    state: StateBytes
    seconds: float
    peak_mib: float


def look(tables: RunFile, world: int, rank: int, pipe: Connection) -> None:
    """Become one rank of many, and tell what it sees; runs in a process of its own."""
    began = time.process_time()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    mesh = build_mesh(sizes_of(tables, world))
    held = HeldStages(layers_held(tables, mesh.pp.rank), stages_of(tables).count)
    model = build_model(tables.model, mesh=mesh, device="meta", held=held)
    of_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    weights = sum(p.numel() for p in model.parameters()) - of_experts, of_experts
    layers = list(model.layers.values())
    experts = [layer.feedforward.part.experts for layer in layers if hasattr(layer.feedforward.part, "experts")]
    parts = stage_parts(model, held) if mesh.pp.is_split else {}
    units = [*experts, *layers, *(parts.values() or [model])]
    plan = plan_of(tables)
    table, meta = placement_table(model), torch.device("meta")
    engine = shard(model, units, table, mesh, stage=plan.stage, device=meta, reductions=Reductions(plan.schedule))

    buckets = [bucket for inner in engine._engines for bucket in inner.buckets]
    gradients = sum(bucket.mine.nbytes * (bucket.num_rows + (bucket.num_rows > 1)) for bucket in buckets)
    gradients += 4 * max(p.numel() for p in model.parameters())  # the one on its way into a bucket
    held_numbers = sum(part.parameter.numel() for part in engine.parts.values())
    state = StateBytes(4 * sum(weights), 0, gradients, 8 * held_numbers)
    axes = {name: axis.ranks for name, axis in mesh.axes.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pipe.send(Seen(axes, weights, state, time.process_time() - began, peak))


def seen_by(tables: RunFile, world: int, rank: int) -> Seen:
    context: Any = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=look, args=(tables, world, rank, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join(60)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "moe" in name else pytest.mark.slow) for name in LAYOUTS]
)
def test_a_rank_of_many_holds_what_the_run_file_predicts(name: str) -> None:
    world, model, parallel = LAYOUTS[name]
    batch = {"global_batch_size": 1024}
    tables = run_file(model=model, parallel=parallel, zero={"stage": 1}, train=batch, data={"seq_len": 4096})
    assert check(tables, world) == []
    stage_ranks = world // tables.parallel.pp
    # The first and the last rank of every stage of the pipeline.
    ranks = sorted({at for begin in range(0, world, stage_ranks) for at in (begin, begin + stage_ranks - 1)})
    totals = []
    for rank in ranks if name != "1024, moe" else ranks[::3]:
        seen = seen_by(tables, world, rank)
        assert_axes(seen.axes, tables, world, rank)
        assert seen.weights == held_weights(tables, rank // stage_ranks)[:2]
        totals.append(seen.state)
        print(f"{name}, rank {rank}: {seen.seconds:.2f} s of CPU, {seen.peak_mib:.0f} MiB")
        assert seen.seconds < 60
        assert seen.peak_mib < 4096, "nothing of the model may be allocated"
    assert max(totals, key=sum) == state_bytes(tables, world)


def assert_axes(axes: dict[str, tuple[int, ...]], tables: RunFile, world: int, rank: int) -> None:
    """Hold the ranks along each axis to the sizes: their number, and one stride."""
    sizes = sizes_of(tables, world)
    strides = {"tp": 1, "cp": sizes.tp, "dp_shard": sizes.tp * sizes.cp}
    strides["dp_replicate"] = strides["dp_shard"] * sizes.dp_shard
    strides["pp"] = strides["dp_replicate"] * sizes.dp_replicate
    strides |= {"etp": 1, "ep": sizes.etp, "edp": sizes.etp * sizes.ep}
    for name, stride in strides.items():
        assert rank in axes[name]
        assert len(axes[name]) == getattr(sizes, name)
        assert all(later - earlier == stride for earlier, later in pairwise(axes[name]))
