"""What is done to a model from outside, in one order: compile, recompute, ZeRO, initial weights.

A layer is compiled or recomputed, not both (the run file's checks refuse it); FSDP2 gathers around it. The weights are
filled last, when each rank holds its final part and nothing else.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from meshwright.kernels.limits import USUAL, Limits
from meshwright.parallel.initialise import fill, init_rules
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.placement import Placement
from meshwright.parallel.recompute.policy import Recompute, keep_less
from meshwright.parallel.tally import Tally
from meshwright.parallel.zero.engine import Reductions, Schedule, ZeroEngine, shard


@dataclass(frozen=True)
class Plan:
    """How one rank runs a model; plain values, spent here."""

    stage: int = 0
    compute_dtype: torch.dtype | None = None
    """Type of the weights in the forward pass where it is narrower than their masters'."""
    recompute: Recompute = field(default_factory=Recompute)
    compile: bool = False
    schedule: Schedule = "none"
    """How a pipeline's schedule computes gradients, if one runs the model."""
    limits: Limits = USUAL


def apply(
    model: nn.Module,
    layers: list[nn.Module],
    units: list[nn.Module],
    table: dict[str, Placement],
    mesh: Mesh,
    tally: Tally,
    plan: Plan,
    device: torch.device,
) -> ZeroEngine:
    """Prepare a model built on the meta device for training on `device`; its weights are not yet filled.

    `layers` are what is recomputed and compiled, `units` what ZeRO-2 and ZeRO-3 gather at a time, inner ones first.
    """
    if plan.compile:
        # Parts of one kind share their code; each of its forms (training, evaluation, autocast) is one compilation.
        torch._dynamo.config.recompile_limit = 64
        for layer in layers:
            layer.forward = torch.compile(layer.forward)
    keep_less(layers, tally, plan.recompute, device)
    return shard(
        model,
        units,
        table,
        mesh,
        stage=plan.stage,
        device=device,
        compute_dtype=plan.compute_dtype,
        reductions=Reductions(plan.schedule, plan.limits.bucket_bytes),
    )


def fill_initial_weights(model: nn.Module, engine: ZeroEngine, seed: int, limits: Limits = USUAL) -> None:
    """Give every part its initial weights, each element by its global name and index, and publish them."""
    rules = init_rules(model)
    for name, part in engine.parts.items():
        part.parameter.detach().zero_()
        held = part.real(part.parameter.detach())
        fill(
            held,
            rules[name],
            seed=seed,
            name=name,
            global_shape=part.global_shape,
            offset=part.offset,
            at_once=limits.initial_weights,
        )
    engine.publish_weights()
