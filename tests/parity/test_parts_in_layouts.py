"""Every part, in every layout that its run file may ask for, computes what one process computes; two names refuse cp.

A sample (part_samples.py) is trained in fp64, documents apart: initial weights bitwise, losses, gradients, norms and
updated weights to 1e-9, counts exactly. Which layouts a sample has is what `check` lets pass, and what it refuses is
held to what is promised. Pipelines go by another schedule from sample to sample.
"""

from functools import cache

import pytest
from engine_cases import BATCH, SEQ, Samples, Trace, assert_same, train
from part_samples import OF_KINDS, OF_LAYERS, OF_VARIANTS, SAMPLES
from rank_pool import run_mesh
from runfile_cases import run_file

from meshwright.launcher.runfile.cross_checks import check
from meshwright.model.config import ModelConfig
from meshwright.parallel.apply import Plan
from meshwright.parallel.config import ZERO_BUBBLE
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.pipeline.orders import Stages

LAYOUTS = {
    "tp": (Sizes(tp=2), 0),
    "cp": (Sizes(cp=2), 0),
    "pp": (Sizes(pp=2), 0),
    "ep": (Sizes(dp_shard=2, ep=2), 1),
    "etp": (Sizes(dp_shard=2, etp=2), 0),
    "tp, cp": (Sizes(tp=2, cp=2), 1),
    "pp, tp": (Sizes(pp=2, tp=2), 1),
    "ZeRO-1": (Sizes(dp_shard=2), 1),
    "ZeRO-2": (Sizes(dp_shard=2), 2),
    "ZeRO-3": (Sizes(dp_shard=2), 3),
    "ZeRO-3, tp": (Sizes(dp_shard=2, tp=2), 3),
}
DEFAULT = [
    ("mamba2, one group", "tp"),  # copies of B and C; two groups: tests/model/mixers/test_state_mixers.py
    *((name, "tp") for name in OF_KINDS if name not in ("mamba2", "mlp", "moe")),
    *((name, "cp") for name in ("mamba2", "mamba1", "gated_delta", "latent_attention", "switch_head")),
    ("moe", "ep"),
    ("depth by sigmoid", "tp, cp"),
    ("further tokens", "pp"),
    ("shared layers", "ZeRO-3"),
]
# What only stands around the parts, or within them, is cut as they are.
FEW = ("ep", "tp, cp", "pp, tp", "ZeRO-3, tp")
OF_EVERY_LAYOUT = {**OF_KINDS, **OF_VARIANTS, **OF_LAYERS}
# Of each schedule, the stages of a rank: a sample takes one where its layout has pp, and another where tp is beside it.
SCHEDULES = {"gpipe": 1, "interleaved_1f1b": 2, "1f1b": 1, "zbv": 2, "interleaved_zero_bubble": 2}
WITHOUT_CP = {"block_sparse_attention", "s4d"}
APART = Samples(mask_documents=True)


def stages_in(name: str, layout: str) -> Stages:
    """Return the stages of a sample's pipeline, under the schedule whose turn it is of those that it may have."""
    config, ranks = SAMPLES[name], LAYOUTS[layout][0].pp
    whole_backwards = config.tie_embeddings and config.multi_token is not None
    fitting = [each for each in SCHEDULES if not (whole_backwards and each in ZERO_BUBBLE)]
    schedule = fitting[(list(SAMPLES).index(name) + list(LAYOUTS).index(layout)) % len(fitting)]
    return Stages(schedule, ranks, SCHEDULES[schedule]) if ranks > 1 else Stages("gpipe", 1)


def config_in(name: str, layout: str) -> ModelConfig:
    """Return the sample, with as many layers as there are stages at least."""
    config, stages = SAMPLES[name], stages_in(name, layout)
    return config.model_copy(update={"num_layers": max(config.num_layers, stages.count)})


def problems(name: str, layout: str) -> list[str]:
    """Return what `check` has against the sample in the layout."""
    sizes, stage = LAYOUTS[layout]
    parallel = {axis: getattr(sizes, axis) for axis in ("tp", "cp", "pp", "ep", "etp")}
    return check(
        run_file(
            model=config_in(name, layout).model_dump(),
            data={"store": "s", "seq_len": SEQ, "mask_documents": True},
            train={"steps": 2, "global_batch_size": BATCH, "micro_batch_size": 2, "precision": "fp64"},
            parallel=parallel,
            zero={"stage": stage},
            pipeline={"schedule": stages_in(name, layout).schedule},
        ),
        sizes.world,
    )


def trained(mesh: Mesh, config: ModelConfig, plan: Plan, micro_batch: int, stages: Stages | None = None) -> Trace:
    steps = 2 if config.moe else 1  # what experts learn of a step bears on the next
    return train(mesh, config, plan, steps=steps, micro_batch=micro_batch, samples=APART, stages=stages)


@cache
def definition(name: str, num_layers: int) -> Trace:
    config = SAMPLES[name].model_copy(update={"num_layers": num_layers})
    return trained(single_process_mesh(), config, Plan(), BATCH)


def case(mesh: Mesh, name: str, layout: str, micro_batch: int) -> Trace:
    plan, stages = Plan(stage=LAYOUTS[layout][1]), stages_in(name, layout)
    return trained(mesh, config_in(name, layout), plan, micro_batch, stages if mesh.pp.is_split else None)


def promised(name: str, layout: str) -> bool:
    """Say whether the part is to be had in the layout."""
    config, (sizes, _) = SAMPLES[name], LAYOUTS[layout]
    kinds = {kind.name for kind in config.part_kinds}
    return not (
        (sizes.cp > 1 and kinds & WITHOUT_CP)
        or (sizes.ep * sizes.etp > 1 and config.moe is None)
        or (sizes.pp > 1 and config.distinct_layers)
    )


def cases() -> list[object]:
    """Return what is run by default, and all else."""
    every = [
        (name, layout)
        for name in SAMPLES
        for layout in (LAYOUTS if name in OF_EVERY_LAYOUT else FEW)
        if promised(name, layout)
    ]
    rare = [pytest.param(*case, marks=pytest.mark.slow) for case in every if case not in DEFAULT]
    return [*DEFAULT, *rare]


@pytest.mark.parametrize(("name", "layout"), cases())
def test_a_part_computes_in_a_layout_what_it_computes_on_one_process(name: str, layout: str) -> None:
    sizes, _ = LAYOUTS[layout]
    micro_batch = BATCH // (2 * sizes.dp_shard)
    for trace in run_mesh(sizes, case, name, layout, micro_batch):
        assert_same(trace, definition(name, config_in(name, layout).num_layers))


@pytest.mark.parametrize("name", [*OF_KINDS, "depth around S-", "shared layers", "hybrid", "further tokens"])
def test_nothing_is_refused_but_what_is_said(name: str) -> None:
    for layout in LAYOUTS:
        assert (problems(name, layout) == []) == promised(name, layout), layout
