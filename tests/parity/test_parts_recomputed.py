"""Every part over cp, its heads exchanged (Ulysses) or its layers recomputed, computes what one process computes.

As in test_parts_in_layouts.py a sample is trained in fp64, documents apart, and held to one process that keeps all;
there every sample goes around the ring and keeps what it computes. What is recomputed here communicates: keys and
values go around again, heads are exchanged again, states come again from the rank before.
"""

from functools import cache
from typing import NamedTuple

import pytest
from engine_cases import BATCH, Samples, Trace, assert_same, train
from part_samples import SAMPLES
from rank_pool import run_mesh

from meshwright.parallel.apply import Plan
from meshwright.parallel.config import ContextWay
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.recompute.policy import Recompute


class Way(NamedTuple):
    """How attention goes over cp, and what is kept of a layer."""

    context: ContextWay = "ring"
    recompute: Recompute = Recompute()


WAYS = {
    "ulysses": Way("ulysses"),
    "full": Way(recompute=Recompute("full")),
    "selective": Way(recompute=Recompute("selective", save=("attention", "matmul"))),
    "ulysses, selective": Way("ulysses", Recompute("selective", save=("attention",))),
}
DEFAULT = [
    ("depth around *-", "ulysses"),
    ("hybrid", "ulysses, selective"),
    ("gated_delta", "full"),
    ("latent_attention", "selective"),
]


def is_for(way: Way, name: str) -> bool:
    """Say whether the sample goes over cp, and has heads to exchange if the way exchanges them."""
    config = SAMPLES[name]
    kinds = config.part_kinds
    has_heads = any(need.axis == "heads" for kind in kinds for need in kind.needs(config))
    return not any("cp" in kind.refuses for kind in kinds) and (has_heads or way.context == "ring")


def trained(mesh: Mesh, name: str, way: Way, micro_batch: int) -> Trace:
    return train(
        mesh,
        SAMPLES[name],
        Plan(recompute=way.recompute),
        steps=2 if SAMPLES[name].moe else 1,  # what experts learn of a step bears on the next
        micro_batch=micro_batch,
        samples=Samples(way.context, mask_documents=True),
    )


@cache
def definition(name: str) -> Trace:
    return trained(single_process_mesh(), name, Way(), BATCH)


def cases() -> list[object]:
    """Return what is run by default, and all else."""
    every = [(name, way) for name in SAMPLES for way in WAYS if is_for(WAYS[way], name)]
    assert set(DEFAULT) <= set(every)
    return [*DEFAULT, *(pytest.param(*case, marks=pytest.mark.slow) for case in every if case not in DEFAULT)]


@pytest.mark.parametrize(("name", "way"), cases())
def test_a_part_over_cp_computes_what_one_process_computes(name: str, way: str) -> None:
    for trace in run_mesh(Sizes(cp=2), trained, name, WAYS[way], BATCH // 2):
        assert_same(trace, definition(name))
