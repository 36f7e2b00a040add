"""What each rank holds between steps, to the byte, is what its shapes make; on average it is what footprint.py says.

footprint.py knows averages: N/d of N numbers over d ranks. Dims that do not divide are cut like torch.chunk: of 37 rows
four ranks hold 10, 10, 10 and 7. Here shapes, cuts and places are written by hand. On top comes the padding:

    ZeRO-1      a bucket has d rows of one length, each parameter's dim 0 in d parts rounded up; the rank's own is kept
    ZeRO-2, 3   FSDP2 keeps a short part in room for a full one: masters; gradients are as short as the part
"""

import gc
from math import ceil, prod
from typing import NamedTuple

import pytest
import torch
from engine_cases import SEQ, Run, forward_backward, start
from parity_samples import Sample, sample
from rank_pool import run_mesh
from storages import Storages

from meshwright.launcher.build import held_dtype, plan_of, sizes_of
from meshwright.launcher.runfile.footprint import StateBytes, state_bytes
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.stages import stages_of
from meshwright.launcher.training.optimizer import Optimizer
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.placement import placement_table
from meshwright.parallel.zero.engine import ZeroEngine
from meshwright.parallel.zero.part import Part


class Held(NamedTuple):
    """What one rank holds, and how much of it is padding, in bytes."""

    found: StateBytes
    padding: StateBytes


COUNT_BYTES = 4
"""AdamW's count of updates, one for each parameter; no part of these models is one number."""


def storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of each piece of memory that some tensors lie in."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local if t.numel()}


def held_between_steps(mesh: Mesh, drawn: Sample, precision: str) -> StateBytes:
    run_file = drawn.run_file(precision=precision)
    stage, dtype = run_file.zero.stage, held_dtype(run_file)
    run = start(mesh, run_file.model, plan_of(run_file), dtype=dtype, stages=stages_of(run_file))
    parts = run.engine.parts
    moments, _ = bytes_of_optimizer(run, run_file, drawn.micro_batch)

    table = placement_table(run.model)
    split = {name for name in parts if table[name].zero_axis(mesh).is_split}
    parameters = dict(run.model.named_parameters())
    computed = storages([p for name, p in parameters.items() if stage < 2 or name not in split])
    updated = storages([part.parameter for part in parts.values()])
    return StateBytes(
        weights=sum(computed.values()),
        masters=sum(size for at, size in updated.items() if at not in computed),
        gradients=gradient_bytes(run.engine, parts),
        moments=moments,
    )


def bytes_of_optimizer(run: Run, run_file: RunFile, micro_batch: int) -> tuple[int, int]:
    """Take two steps of the product's; return what it made that lives after them, and of that the counts of updates."""
    forward_backward(run, 0, micro_batch)
    parts = [part.parameter for part in run.engine.parts.values()]
    there = storages([*parts, *(held.grad for held in parts)])  # what is changed in place is seen too
    with Storages() as seen:
        optimizer = Optimizer(run.engine.parts, run_file.optimizer, run.mesh)
        for _ in range(2):
            optimizer.step(0.01)
    run.engine.publish_weights()
    gc.collect()
    living = [storage.nbytes() for storage in seen.living() if storage.data_ptr() not in there]
    counts = [nbytes for nbytes in living if nbytes == COUNT_BYTES]
    del optimizer  # not before: it is what holds them
    return sum(living) - sum(counts), sum(counts)


def gradient_bytes(engine: ZeroEngine, parts: dict[str, Part]) -> int:
    """Return the bytes of the buckets, and of parts' gradients that lie in none."""
    buckets = [bucket for inner in engine._engines for bucket in getattr(inner, "buckets", [])]
    in_buckets = storages([tensor for bucket in buckets for tensor in (bucket.rows, bucket.mine) if tensor is not None])
    others = [part.parameter.grad for part in parts.values()]
    return sum(in_buckets.values()) + sum(
        gradient.nbytes for gradient in others if gradient.untyped_storage().data_ptr() not in in_buckets
    )


# The models of engine_cases: each matrix with the dim that tp cuts, None where every rank holds all of it.
ATTENTION = {"q": ((24, 22), 0), "k": ((12, 22), 0), "v": ((12, 22), 0), "output": ((22, 24), 1)}
MLP = {"gate": ((52, 22), 0), "up": ((52, 22), 0), "down": ((22, 52), 1)}
SHARED = {"router": ((6, 22), None), "gate": ((20, 22), 0), "up": ((20, 22), 0), "down": ((22, 20), 1)}
NORMS = {"mixer norm": ((22,), None), "feedforward norm": ((22,), None)}
QK_NORMS = {"q_norm": ((6,), None), "k_norm": ((6,), None)}
NUM_LAYERS = {"dense": 4, "moe": 2}


def dense_shapes(model: str, tp: int, layers: int, *, is_first: bool, is_last: bool) -> list[tuple[int, ...]]:
    """Return the shapes that a rank computes with, all but those of experts."""
    tables = [ATTENTION, MLP, NORMS] if model == "dense" else [ATTENTION, SHARED, NORMS, QK_NORMS]
    layer = [cut for table in tables for cut in table.values()]
    shapes = [tuple(size // tp if dim == at else size for dim, size in enumerate(whole)) for whole, at in layer]
    vocabulary = (ceil(37 / tp), 22)
    return shapes * layers + [vocabulary] * is_first + [vocabulary, (22,)] * is_last


def made_by_hand(run_file: RunFile, model: str, rank: int, world: int, bytes_of: tuple[int, int]) -> Held:
    """Return what a rank holds: tp lies innermost, then cp, dp_shard, dp_replicate and pp; etp, ep, edp and pp."""
    sizes, stage_ranks = run_file.parallel, world // run_file.parallel.pp
    layers, pp_rank = NUM_LAYERS[model] // sizes.pp, rank // stage_ranks
    shards = sizes.dp_shard * sizes.cp
    dense = dense_shapes(model, sizes.tp, layers, is_first=pp_rank == 0, is_last=pp_rank == sizes.pp - 1)
    held = [bytes_of_one(shape, shards, rank // sizes.tp % shards, run_file.zero.stage, bytes_of) for shape in dense]
    if model == "moe":
        ep, etp = sizes.ep, sizes.etp
        experts = [(6 // ep, 20 // etp, 22), (6 // ep, 20 // etp, 22), (6 // ep, 22, 20 // etp)] * layers
        edp, at = stage_ranks // (ep * etp), rank % stage_ranks // (ep * etp)
        held += [bytes_of_one(shape, edp, at, run_file.zero.stage, bytes_of) for shape in experts]
    return Held(*(StateBytes(*(sum(column) for column in zip(*part, strict=True))) for part in zip(*held, strict=True)))


def bytes_of_one(shape: tuple[int, ...], d: int, at: int, stage: int, bytes_of: tuple[int, int]) -> Held:
    """Return what rank `at` of `d` holds for one parameter; `bytes_of` a number computed with, and one updated."""
    compute, update = bytes_of
    rows, rest = shape[0], prod(shape[1:])
    full = ceil(rows / d)
    mine = min(full, max(0, rows - at * full))
    number, part, room = rows * rest, mine * rest, full * rest
    if stage == 0 or d == 1:
        masters = update * number if compute < update else 0
        return Held(StateBytes(compute * number, masters, update * number, 2 * update * number), StateBytes(0, 0, 0, 0))
    if stage == 1:
        masters = update * part if compute < update else 0
        found = StateBytes(compute * number, masters, update * room, 2 * update * part)
        return Held(found, StateBytes(0, 0, update * (room - part), 0))
    masters = update * room if mine else 0
    found = StateBytes(0, masters, update * part, 2 * update * part)
    return Held(found, StateBytes(0, masters - update * part, 0, 0))


LAYOUTS = [
    *(sample("dense", dp_shard=2, zero__stage=stage, micro_batch=4) for stage in range(4)),
    *(sample("dense", dp_replicate=2, dp_shard=2, zero__stage=stage, micro_batch=2) for stage in (1, 3)),
    sample("dense", dp_shard=2, tp=2, zero__stage=2, micro_batch=4),
    sample("moe", dp_shard=4, ep=2, zero__stage=1, micro_batch=2),
    # Two copies of all but the experts, which are shared over the same two ranks.
    sample("moe", dp_replicate=2, dp_shard=1, zero__stage=1, micro_batch=4),
    sample("moe", dp_shard=4, ep=2, zero__stage=3, micro_batch=2),
    sample("moe", dp_shard=2, ep=2, zero__stage=2, micro_batch=4),
    sample("dense", pp=2, dp_shard=2, zero__stage=1, micro_batch=2),
    sample("dense", cp=2, dp_shard=2, zero__stage=2, micro_batch=4),
    sample("moe", dp_shard=1, cp=2, tp=2, ep=2, zero__stage=1, micro_batch=8),
]


BY_PRECISION = [(drawn, precision) for precision in ("fp32", "bf16") for drawn in LAYOUTS]
"""The stages of the dense model and the experts of ZeRO-1 and 3 in both precisions at once; the rest is slow."""
USUAL = [(drawn, "fp32") for drawn in (*LAYOUTS[:4], LAYOUTS[7], LAYOUTS[10], LAYOUTS[13])]
USUAL += [(drawn, "bf16") for drawn in (*LAYOUTS[1:4:2], LAYOUTS[9])]


@pytest.mark.parametrize(
    ("drawn", "precision"),
    [pytest.param(*case, marks=[] if case in USUAL else pytest.mark.slow) for case in BY_PRECISION],
    ids=str,
)
def test_each_rank_holds_what_its_shapes_make_and_the_average_is_the_footprint(drawn: Sample, precision: str) -> None:
    run_file = drawn.run_file(precision=precision)
    ranks = run_mesh(sizes_of(run_file, drawn.world), held_between_steps, drawn, precision)
    bytes_of = {"fp32": (4, 4), "bf16": (2, 4)}[precision]
    by_hand = [made_by_hand(run_file, drawn.model, rank, drawn.world, bytes_of) for rank in range(drawn.world)]
    assert ranks == [held.found for held in by_hand]

    expected = state_bytes(run_file, drawn.world)
    # Between steps no gradients are left but the sums, one number where AdamW has two moments, and FSDP2 holds no
    # gathered weights; `check` counts what there is at most.
    expected = expected._replace(gradients=expected.moments / 2)
    if run_file.zero.stage == 2:
        expected = expected._replace(
            weights=state_bytes(drawn.run_file(precision=precision, stage=3), drawn.world).weights
        )
    real = [
        [a - b for a, b in zip(found, held.padding, strict=True)] for found, held in zip(ranks, by_hand, strict=True)
    ]
    size = drawn.world // run_file.parallel.pp
    stages = [real[begin : begin + size] for begin in range(0, drawn.world, size)]
    means = [[sum(column) / size for column in zip(*stage, strict=True)] for stage in stages]
    assert max(means, key=sum) == pytest.approx(list(expected), abs=1e-6)


def left_by_a_step(mesh: Mesh, drawn: Sample) -> tuple[int, int]:
    """Return the bytes that a step made and left, and those of the gradients that it is to leave."""
    run_file = drawn.run_file()
    run = start(mesh, run_file.model, plan_of(run_file), stages=stages_of(run_file))
    forward_backward(run, 0, drawn.micro_batch)  # the first step makes what later ones find
    run.engine.publish_weights()
    with Storages() as seen:
        total = forward_backward(run, 1, drawn.micro_batch)
        run.engine.publish_weights()
    del total
    gc.collect()
    gradients = storages([part.parameter.grad for part in run.engine.parts.values()])
    made = {storage.data_ptr(): storage.nbytes() for storage in seen.living()}
    made.pop(run.tally._flat.untyped_storage().data_ptr(), None)  # only added to
    return sum(made.values()), sum(size for at, size in gradients.items() if at in made)


SHARDED = [
    sample("dense", dp_shard=2, tp=2, zero__stage=3, micro_batch=4),
    sample("moe", dp_shard=2, cp=2, ep=2, zero__stage=3, micro_batch=4),
    sample("dense", dp_shard=2, pp=2, zero__stage=3, micro_batch=2),
    sample("moe", dp_shard=4, ep=2, zero__stage=3, micro_batch=2),
    sample("dense", dp_shard=2, zero__stage=2, micro_batch=4),
]


@pytest.mark.parametrize(
    "drawn", [*SHARDED[:3], *(pytest.param(each, marks=pytest.mark.slow) for each in SHARDED[3:])], ids=str
)
def test_a_step_leaves_no_gathered_weights_behind(drawn: Sample) -> None:
    """Among all bytes that live, which a list of the parameters would not show."""
    for made, gradients in run_mesh(sizes_of(drawn.run_file(), drawn.world), left_by_a_step, drawn):
        # A schedule of torch's keeps the activations that it sends and receives, of two micro-batches at most.
        kept_by_schedule = 4 * SEQ * drawn.micro_batch * 22 * 8 if drawn.has("pp") else 0
        assert 0 < gradients <= made <= gradients + kept_by_schedule


def held_by_optimizer(mesh: Mesh, drawn: Sample) -> tuple[int, int]:
    run_file = drawn.run_file(precision="fp32")
    run = start(mesh, run_file.model, plan_of(run_file), dtype=torch.float32, stages=stages_of(run_file))
    return bytes_of_optimizer(run, run_file, drawn.micro_batch)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2)), 1, 3])
def test_the_optimizer_holds_its_moments_and_counts_and_nothing_else(stage: int, kind: str) -> None:
    """Among all bytes that it made and that live between steps: a whole copy anywhere would be among them."""
    drawn = sample("moe", dp_shard=2, zero__stage=stage, optimizer__kind=kind, micro_batch=4)
    matrices = [shape for shape, _ in (*ATTENTION.values(), *(SHARED[name] for name in ("gate", "up", "down")))]
    matrices += [(6, 20, 22), (6, 20, 22), (6, 22, 20)]
    others = [shape for table in (NORMS, QK_NORMS) for shape, _ in table.values()] + [SHARED["router"][0]]
    one_moment = matrices * 2 if kind == "muon" else []
    two_moments = [*others * 2, (37, 22), (22,), (37, 22), *([] if one_moment else matrices * 2)]
    for rank, found in enumerate(run_mesh(sizes_of(drawn.run_file(), 2), held_by_optimizer, drawn)):
        both = [bytes_of_one(shape, 2, rank, stage, (4, 4)).found.moments for shape in two_moments]
        one = [bytes_of_one(shape, 2, rank, stage, (4, 4)).found.moments / 2 for shape in one_moment]
        assert found == (sum(both) + sum(one), COUNT_BYTES * len(both)), f"rank {rank}"
