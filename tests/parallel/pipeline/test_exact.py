"""Every schedule computes what one process computes, in every way that a pipeline stands together with other axes."""

from functools import cache

import pytest
from engine_cases import Trace, dense_config, moe_config, train
from rank_pool import run_mesh
from test_layouts import assert_same

from meshwright.parallel.apply import Plan
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.pipeline.orders import Stages

CONFIGS = {
    "dense": dense_config(num_layers=8),
    "tied": dense_config(num_layers=8, tie_embeddings=True, bias=("q", "k", "v", "output", "ffn")),
    "moe": moe_config(num_layers=8),
    "moe-step-balance": moe_config(num_layers=8, num_experts=4, load_balancing="step", tie_embeddings=True),
}
TWO = Sizes(pp=2)


@cache
def definition(name: str) -> Trace:
    return train(single_process_mesh(), CONFIGS[name], Plan(), micro_batch=2)


def case(mesh: Mesh, name: str, schedule: str, per_rank: int, plan: Plan, micro_batch: int) -> Trace:
    stages = Stages(schedule, mesh.pp.size, per_rank)
    return train(mesh, CONFIGS[name], plan, micro_batch=micro_batch, stages=stages)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("schedule", "per_rank"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_zero_bubble", 2), ("zbv", 2), ("dualpipev", 2)],
)
@pytest.mark.parametrize("stage", [0])
def test_a_schedule(name: str, schedule: str, per_rank: int, stage: int) -> None:
    for trace in run_mesh(TWO, case, name, schedule, per_rank, Plan(stage=stage), 1):
        assert_same(trace, definition(name))
