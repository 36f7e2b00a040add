"""One face for every ZeRO stage: which parameters go by buckets, which through FSDP2, and all their parts together.

    stage   weights            gradients after the reduction   moments and masters
    0       whole              whole                           whole
    1       whole              parts                           parts
    2       parts, gathered    parts                           parts
            once a step
    3       parts, gathered    parts                           parts
            for each pass

The whole gradients that stage 1 collects are let go when they are reduced (buckets.py).

Stages 2 and 3 need an axis to shard over: a parameter whose ZeRO axis has one rank (experts when ep takes all
ranks, anything on one process) has nothing to shard and goes by buckets, which is the same result.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from meshwright.kernels.limits import USUAL
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.placement import Placement
from meshwright.parallel.zero.buckets import BucketEngine
from meshwright.parallel.zero.fsdp import FsdpEngine, shard_modules
from meshwright.parallel.zero.part import Part

Schedule = Literal["none", "whole backward", "split backward"]


@dataclass(frozen=True)
class Reductions:
    """When gradients are summed over the ranks, and how many together."""

    schedule: Schedule = "none"
    """How a pipeline computes gradients, if one runs the model: in one pass, or those of the weights apart."""
    bucket_bytes: int = USUAL.bucket_bytes
    """A bucket of stages 0 and 1 that holds as many takes no further parameter."""


AT_ONCE = Reductions()


class ZeroEngine:
    """Sums the gradients of a model, holds the parts that the optimizer updates, and brings them back."""

    def __init__(self, engines: list[BucketEngine | FsdpEngine], order: list[str]) -> None:
        """Compose engines; `order` is that of the model's parameters."""
        self._engines = engines
        together = {name: part for engine in engines for name, part in engine.parts.items()}
        self.parts: dict[str, Part] = {name: together[name] for name in order}

    def start_step(self, num_micro_batches: int) -> None:
        """Begin a step of so many micro-batches, each of which gives every parameter one gradient."""
        for engine in self._engines:
            engine.start_step(num_micro_batches)

    def finish_gradients(self) -> None:
        """Wait until every part's gradient is the sum over all ranks."""
        for engine in self._engines:
            engine.finish_gradients()

    def publish_weights(self) -> None:
        """Bring what the optimizer wrote into the weights that the model computes with."""
        with torch.no_grad():
            for engine in self._engines:
                engine.publish_weights()


def shard(
    model: nn.Module,
    units: list[nn.Module],
    table: dict[str, Placement],
    mesh: Mesh,
    *,
    stage: int,
    device: torch.device,
    compute_dtype: torch.dtype | None = None,
    reductions: Reductions = AT_ONCE,
) -> ZeroEngine:
    """Place a model built on the meta device on `device`, under a ZeRO stage; its weights are not yet filled.

    `units` are the modules that stages 2 and 3 gather one at a time, inner ones before the modules around them;
    the model itself, or each stage of it, comes last. `compute_dtype` is the weights' type where it is narrower than
    their masters'.

    Raises:
        ValueError: if a parameter has no dims to cut.
    """
    parameters = dict(model.named_parameters())
    local_shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    by_fsdp = {name for name in parameters if stage >= 2 and table[name].zero_axis(mesh).is_split}
    for name, shape in local_shapes.items():
        if not shape:
            raise ValueError(f"{name} has no dims, and state is cut along dim 0; give it the shape [1]")
    for name, parameter in parameters.items():
        if name not in by_fsdp and compute_dtype is not None:
            parameter.data = parameter.data.to(compute_dtype)
    axes = {parameters[name]: table[name].zero_axis(mesh) for name in by_fsdp}
    wrapped = shard_modules(units, axes, stage=stage, device=device, dtype=compute_dtype)
    model.to_empty(device=device)
    for unit in wrapped:
        # FSDP2 learns of new tensors where a conversion begins at or above the unit; the stages of a pipeline stand
        # beside the model. A part made before it learns would not be what FSDP2 gathers, once it pads a short one.
        assert isinstance(unit, nn.Module)
        unit.to(device=device)

    placed = dict(model.named_parameters())
    engines: list[BucketEngine | FsdpEngine] = []
    plain = {name: parameter for name, parameter in placed.items() if name not in by_fsdp}
    at_end = reductions.schedule == "split backward"
    if plain:
        engines.append(
            BucketEngine(
                plain, table, mesh, shard_state=stage >= 1, take_at_end=at_end, bucket_bytes=reductions.bucket_bytes
            )
        )
    if by_fsdp:
        sharded = {name: placed[name] for name in placed if name in by_fsdp}
        engines.append(FsdpEngine(sharded, wrapped, local_shapes, table, mesh, at_end=at_end))
    return ZeroEngine(engines, list(placed))
