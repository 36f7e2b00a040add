"""`prove` takes every part: each sample of the table, in a layout that cuts it, computes what one process does."""

import pytest
from part_samples import OF_ENDS, OF_KINDS, OF_LAYERS, OF_NORMS, OF_POSITIONS, OF_ROUTERS, OF_VARIANTS, SAMPLES
from runfile_cases import run_file

from meshwright.launcher.proof.prove import Plan, plan_proof, prove

# What `prove` itself does with a kind's keys (narrowing) differs from kind to kind; norms and positions are alike.
PROVED = [*OF_KINDS, *OF_VARIANTS, *OF_ROUTERS, *OF_LAYERS, *OF_ENDS, *OF_POSITIONS, "norm dynamic_tanh"]
PROVED += [name for name in OF_NORMS if name.startswith("placing ")]


def parallel_of(name: str) -> dict[str, int]:
    """Return two ranks' way to cut it: experts, samples, or matrices."""
    config = SAMPLES[name]
    if config.moe:
        return {"ep": 2}
    if config.distinct_layers or {"block_sparse_attention", "s4d"} & {kind.name for kind in config.part_kinds}:
        return {"tp": 2}
    return {"cp": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROVED)
def test_a_part_is_proved(name: str) -> None:
    parallel = parallel_of(name)
    model = SAMPLES[name].model_dump() | {"max_positions": 64 if SAMPLES[name].max_positions else 0}
    tables = {"data": {"store": "s", "seq_len": 64, "mask_documents": True}, "zero": {"stage": 1}}
    plan = plan_proof(run_file(model=model, parallel=parallel, **tables), 2)
    done = prove(Plan(plan.run_file, plan.target, plan.cover, plan.narrowed, ("exact",)))
    assert done.is_same, [result.first for result in done.results]
