"""What the ranks hold between steps, to the byte, is what launcher/runfile/footprint.py says, and the padding.

footprint.py knows averages: N/d of N numbers over d ranks. Dims that do not divide are cut like torch.chunk, so that
the ranks of an axis hold different numbers which add up to N; moments are exactly these. On top comes the padding:

    ZeRO-1      a bucket has d rows of one length: each parameter's dim 0 in d parts rounded up, sent and received
    ZeRO-2, 3   FSDP2 keeps a short part in room for a full one: masters; gradients are as short as the part
"""

from math import prod
from typing import NamedTuple

import pytest
import torch
from engine_cases import forward_backward, start
from parity_samples import Sample, sample
from rank_pool import run_mesh

from meshwright.launcher.build import held_dtype, plan_of, sizes_of
from meshwright.launcher.runfile.footprint import StateBytes, state_bytes
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.placement import placement_table
from meshwright.parallel.zero.engine import ZeroEngine
from meshwright.parallel.zero.part import Part


class Held(NamedTuple):
    """What one rank holds, and how much of it is padding, in bytes."""

    found: StateBytes
    padding: StateBytes


def storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of each piece of memory that some tensors lie in."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local if t.numel()}


def held_between_steps(mesh: Mesh, drawn: Sample, precision: str) -> Held:
    run_file = drawn.run_file(precision=precision)
    stage, dtype = run_file.zero.stage, held_dtype(run_file)
    run = start(mesh, run_file.model, plan_of(run_file), dtype=dtype)
    parts = run.engine.parts
    optimizer = torch.optim.AdamW([part.parameter for part in parts.values() if part.parameter.numel()])
    forward_backward(run, 0, drawn.micro_batch)
    optimizer.step()
    run.engine.publish_weights()

    table = placement_table(run.model)
    split = {name for name in parts if table[name].zero_axis(mesh).is_split}
    parameters = dict(run.model.named_parameters())
    computed = storages([p for name, p in parameters.items() if stage < 2 or name not in split])
    updated = storages([part.parameter for part in parts.values()])
    moments = sum(s[kind].nbytes for s in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq"))
    found = StateBytes(
        weights=sum(computed.values()),
        masters=sum(size for at, size in updated.items() if at not in computed),
        gradients=gradient_bytes(run.engine, parts),
        moments=moments,
    )
    return Held(found, padding_of(parts, split, mesh, stage))


def gradient_bytes(engine: ZeroEngine, parts: dict[str, Part]) -> int:
    """Return the bytes of the buckets, and of parts' gradients that lie in none."""
    buckets = [bucket for inner in engine._engines for bucket in getattr(inner, "buckets", [])]
    in_buckets = storages([tensor for bucket in buckets for tensor in (bucket.rows, bucket.mine)])
    others = [part.parameter.grad for part in parts.values()]
    return sum(in_buckets.values()) + sum(
        gradient.nbytes for gradient in others if gradient.untyped_storage().data_ptr() not in in_buckets
    )


def padding_of(parts: dict[str, Part], split: set[str], mesh: Mesh, stage: int) -> StateBytes:
    """Return what is held beyond the numbers themselves."""
    masters = gradients = 0
    for name in split if stage else ():
        part = parts[name]
        held, rest = len(part.parameter), prod(part.parameter.shape[1:])
        rows, d = rows_of(part), part.placement.zero_axis(mesh).size
        full, width = -(-rows // d), part.parameter.element_size() * rest
        if stage == 1:
            gradients += (full * d - rows + full - held) * width
        elif held:
            masters += (full - held) * width
    return StateBytes(0, masters, gradients, 0)


def rows_of(part: Part) -> int:
    """Return dim 0 of the parameter that the part is one of: the global one, cut by the placement."""
    rows = part.global_shape[0]
    for cut in part.placement.splits:
        rows = -(-rows // cut.parts) if cut.dim == 0 else rows
    return rows


LAYOUTS = [
    *(sample("dense", dp_shard=2, zero__stage=stage, micro_batch=4) for stage in range(4)),
    *(sample("dense", dp_replicate=2, dp_shard=2, zero__stage=stage, micro_batch=2) for stage in (1, 3)),
    sample("dense", dp_shard=2, tp=2, zero__stage=2, micro_batch=4),
    sample("moe", dp_shard=4, ep=2, zero__stage=1, micro_batch=2),
    sample("moe", dp_shard=4, ep=2, zero__stage=3, micro_batch=2),
    sample("moe", dp_shard=2, ep=2, zero__stage=2, micro_batch=4),
]


@pytest.mark.parametrize("drawn", LAYOUTS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_ranks_together_hold_what_the_footprint_says_and_their_padding(drawn: Sample, precision: str) -> None:
    run_file = drawn.run_file(precision=precision)
    ranks = run_mesh(sizes_of(run_file, drawn.world), held_between_steps, drawn, precision)
    expected = state_bytes(run_file, drawn.world)
    if run_file.zero.stage == 2:  # gathered for each pass; between steps FSDP2 holds none of what it shards
        expected = expected._replace(
            weights=state_bytes(drawn.run_file(precision=precision, stage=3), drawn.world).weights
        )
    for name in StateBytes._fields:
        together = sum(getattr(held.found, name) - getattr(held.padding, name) for held in ranks)
        assert together == pytest.approx(drawn.world * getattr(expected, name), abs=1e-6), name
