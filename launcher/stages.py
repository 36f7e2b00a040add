"""Which layers each stage of a pipeline has, from the run file alone: a cut by predicted cost.

A layer costs the operations of its forward pass, the output its own, the embedding two for each number that is looked
up: next to a layer's products that is little, but it is the first stage's. The cut is a function of the run file, so
that every rank, `check` and the memory's prediction come to the same. Nothing here loads torch.
"""

from functools import lru_cache

from meshwright.launcher.runfile.tables import RunFile
from meshwright.model.config import ModelConfig
from meshwright.model.counts.costs import (
    embedding_forward_flops,
    further_tokens_flops,
    layer_forward_flops,
    output_forward_flops,
)
from meshwright.parallel.pipeline.cut import cut_layers
from meshwright.parallel.pipeline.orders import Stages


def stages_of(run_file: RunFile) -> Stages:
    """Return the stages of a run's pipeline and who holds them; one stage without a pipeline."""
    if run_file.parallel.pp == 1:
        return Stages("gpipe", 1)
    return Stages(run_file.pipeline.schedule, run_file.parallel.pp, run_file.pipeline.stages_held)


def layers_of_stages(run_file: RunFile) -> list[range]:
    """Return the layers of each stage, cut so that the costliest stage costs least."""
    layers, embedding, output = forward_costs(run_file.model, run_file.data.seq_len)
    return list(_cut(tuple(layers), stages_of(run_file).count, embedding, output))


@lru_cache(maxsize=8)
def _cut(layers: tuple[float, ...], num_stages: int, embedding: float, output: float) -> tuple[range, ...]:
    """Cut once: each rank of a pipeline asks in turn, and a cut of hundreds of layers takes a tenth of a second."""
    return tuple(cut_layers(list(layers), num_stages, first_extra=embedding, last_extra=output))


def stage_costs(run_file: RunFile) -> tuple[float, ...]:
    """Return each stage's operations for a token's forward pass."""
    layers, embedding, output = forward_costs(run_file.model, run_file.data.seq_len)
    costs = [sum(layers[at] for at in of) for of in layers_of_stages(run_file)]
    costs[0] += embedding
    costs[-1] += output
    return tuple(costs)


def layers_held(run_file: RunFile, rank: int) -> dict[int, range]:
    """Return the stages that a rank of the pipeline holds, with the layers of each."""
    cut = layers_of_stages(run_file)
    return {stage: cut[stage] for stage in stages_of(run_file).held_by(rank)}


def forward_costs(model: ModelConfig, seq_len: int) -> tuple[list[float], float, float]:
    """Return the operations of a token's forward pass: in each layer, in the embedding and in the output."""
    layers = [layer_forward_flops(model, kinds, seq_len) for kinds in model.layers]
    behind = output_forward_flops(model) + further_tokens_flops(model, seq_len)
    return layers, embedding_forward_flops(model), behind
