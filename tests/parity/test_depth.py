"""Mixture-of-Depths with experts that drop, choose or are recomputed: the same tokens go through in every layout."""

from functools import cache

import pytest
from engine_cases import Samples, Trace, assert_same, dense_config, moe_config, train
from rank_pool import run_mesh

from meshwright.model.config import ModelConfig
from meshwright.parallel.apply import Plan
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.pipeline.orders import Stages
from meshwright.parallel.recompute.policy import Recompute

DEPTH = {"capacity": 0.4, "predictor_size": 7}
CONFIGS: dict[str, ModelConfig] = {
    "dense": dense_config(pattern="*-[*-]", depth={**DEPTH, "gate": "sigmoid"}, residual_dropout=0.1),
    "experts": moe_config(pattern="[*E]", depth=DEPTH, num_experts=4, capacity_factor=0.8, load_balancing="sequence"),
    "choice": moe_config(pattern="[*E]", num_layers=1, depth=DEPTH, num_experts=4, router="expert_choice"),
}


def train_depth(mesh: Mesh, name: str, plan: Plan, samples: Samples) -> Trace:
    stages = Stages("gpipe", mesh.pp.size) if mesh.pp.is_split else None
    return train(mesh, CONFIGS[name], plan, micro_batch=2, samples=samples, stages=stages)


@cache
def definition(name: str, samples: Samples) -> Trace:
    return train_depth(single_process_mesh(), name, Plan(), samples)


SLOW = [
    (Sizes(cp=2), "experts", Plan()),
    (Sizes(cp=2, tp=2, ep=2), "choice", Plan()),
    (Sizes(cp=2), "dense", Plan(recompute=Recompute("full"))),
    (Sizes(dp_shard=2, ep=2), "experts", Plan(stage=3)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "name", "plan"), SLOW)
def test_a_layer_for_some_tokens_gives_the_same_in_a_layout(sizes: Sizes, name: str, plan: Plan) -> None:
    samples = Samples(mask_documents=name == "dense")
    expected = definition(name, samples)
    for trace in run_mesh(sizes, train_depth, name, plan, samples):
        assert_same(trace, expected)
        for ours, theirs in zip(trace.tallies, expected.tallies, strict=True):
            counts = ("depth_chosen", "depth_right", "depth_tokens", "load", "dropped", "droppable")
            for key in (key for key in theirs if key.endswith(counts)):
                assert ours[key] == theirs[key], key
                assert sum(ours[key]) > 0 or key.endswith("dropped")
