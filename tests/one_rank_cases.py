"""Every collective, and a training step under each ZeRO stage, forced on a process group of one rank.

An axis of one rank communicates nothing, so that a machine with one GPU would never call NCCL. A `Forced` axis says
that it is split: the calls are made, and what comes back is what was sent. FSDP2 wraps and gathers; its reduction of
one rank is a copy. The same runs on a CPU with gloo, which shows that the cases themselves are sound.
"""

import inspect
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import SEQ, batch_of, moe_config
from torch import Tensor

from meshwright.model.parts import build_model, reset_buffers
from meshwright.parallel import collectives
from meshwright.parallel.apply import Plan, apply, fill_initial_weights
from meshwright.parallel.mesh import Axis, Mesh, Sizes, single_process_mesh
from meshwright.parallel.placement import placement_table
from meshwright.parallel.tally import Tally, declared_entries


class Forced(Axis):
    """An axis of one rank that communicates all the same."""

    @property
    def is_split(self) -> bool:
        """Say that there is somebody to talk to."""
        return True


def answer(case: Callable[[str], Any], device: str, pipe: Connection) -> None:
    """Run a case in a process of its own, which can import this file, and send back what it returned."""
    pipe.send(case(device))


def join(device: str) -> Axis:
    """Become the only rank of a group, on NCCL for a GPU and on gloo for a CPU."""
    backend = {"cuda": "nccl", "cpu": "gloo"}[device]
    where = torch.device("cuda", 0) if device == "cuda" else None
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60), device_id=where
    )
    return Forced("forced", 1, 0, dist.group.WORLD, (0,))


def _in_place(function: Callable[..., Any]) -> Callable[[Tensor, Axis], Tensor]:
    def call(x: Tensor, axis: Axis) -> Tensor:
        y = x.clone()
        pending = function(y, axis)
        if pending is not None:
            pending.wait()
        return y

    return call


def _started(function: Callable[..., Any]) -> Callable[[Tensor, Axis], Tensor]:
    def call(x: Tensor, axis: Axis) -> Tensor:
        y, pending = function(x, axis)
        pending.wait()
        return y

    return call


def _into(function: Callable[..., Any]) -> Callable[[Tensor, Axis], Tensor]:
    def call(x: Tensor, axis: Axis) -> Tensor:
        out = torch.empty_like(x.flatten())
        function(out, x.flatten(), axis).wait()
        return out.view_as(x)

    return call


# Each takes x [4, 3, 2, 5] and gives it back, as one rank's part of everything is everything.
CASES: dict[str, Callable[[Tensor, Axis], Tensor]] = {
    "all_reduce": _in_place(collectives.all_reduce),
    "all_reduce_max": _in_place(collectives.all_reduce_max),
    "reduce_scatter": _into(collectives.reduce_scatter),
    "all_gather": _into(collectives.all_gather),
    "gather": collectives.gather,
    "sum_over_ranks": collectives.sum_over_ranks,
    "scatter_sum": collectives.scatter_sum,
    "gather_rows": collectives.gather_rows,
    "scatter_sum_of_rows": collectives.scatter_sum_of_rows,
    "start_gather_rows": _started(collectives.start_gather_rows),
    "start_scatter_sum_of_rows": _started(collectives.start_scatter_sum_of_rows),
    "exchange_counts": collectives.exchange_counts,
    "exchange_rows": lambda x, axis: collectives.exchange_rows(x.flatten(1), [4], [4], axis).view_as(x),
    "pass_on": lambda x, axis: collectives.pass_on(x, axis).wait(),
    "sequence_to_heads": collectives.sequence_to_heads,
    "heads_to_sequence": collectives.heads_to_sequence,
}


def cases_on(device: str) -> set[str]:
    """Return the cases that a device's library can do: gloo cannot send to its own rank, NCCL can."""
    return set(CASES) - ({"pass_on"} if device == "cpu" else set())


def collectives_over_an_axis() -> set[str]:
    """Return the names of the functions of parallel/collectives.py that are called with an axis."""
    own = inspect.getmembers(collectives, inspect.isfunction)
    return {
        name
        for name, function in own
        if not name.startswith("_")
        and function.__module__ == collectives.__name__
        and "axis" in inspect.signature(function).parameters
    }


def forced_collectives(device: str) -> dict[str, float]:
    """Return how far each collective's result, and its gradient, is from what was sent."""
    axis, found = join(device), {}
    x = torch.randn(4, 3, 2, 5, device=device, requires_grad=True)
    for name in cases_on(device):
        y = CASES[name](x if name in DIFFERENTIABLE else x.detach(), axis)
        found[name] = (y - x).abs().max().item()
        if name in DIFFERENTIABLE:
            above = torch.randn_like(x)
            (gradient,) = torch.autograd.grad(y, x, above)
            found[f"{name}, backward"] = (gradient - above).abs().max().item()
    return found


DIFFERENTIABLE = {"gather", "sum_over_ranks", "scatter_sum", "exchange_rows", "sequence_to_heads", "heads_to_sequence"}


def forced_training(device: str) -> dict[str, list[float]]:
    """Return three steps' losses: of one process as it is, and under each stage with its axes forced."""
    alone, axis = single_process_mesh(), join(device)
    names = set(alone.axes) - ({"cp"} if device == "cpu" else set())
    axes = alone.axes | {name: Forced(name, 1, 0, axis.group, (0,)) for name in names}
    forced = Mesh(Sizes(), axes, rank=0)
    losses = {"as it is": losses_of(alone, 0, device)}
    # ep, etp and tp too: experts are exchanged, tokens gathered and scattered.
    return losses | {f"stage {stage}": losses_of(forced, stage, device) for stage in range(4)}


def losses_of(mesh: Mesh, stage: int, device: str) -> list[float]:
    """Train a small MoE for three steps on one batch."""
    model = build_model(moe_config(), mesh=mesh, device="meta", dtype=torch.float32)
    tally = Tally({"loss": 1, **declared_entries(model)}, device)
    layers = list(model.layers.values())
    units = [*(layer.feedforward.part.experts for layer in layers), *layers, model]
    plan = Plan(stage=stage)
    engine = apply(model, layers, units, placement_table(model), mesh, tally, plan, torch.device(device))
    fill_initial_weights(model, engine, seed=5)
    reset_buffers(model)
    optimizer = torch.optim.AdamW([part.parameter for part in engine.parts.values()], lr=0.01)
    tokens, targets = (tensor.to(device) for tensor in batch_of(0))
    assert tokens.shape[0] == SEQ
    found = []
    for _ in range(3):
        engine.start_step(1)
        loss = model(tokens, targets)
        loss.backward()
        for inner in engine._engines:
            for reduction in getattr(inner, "_reductions", []):
                assert reduction.calls == 0
                reduction.calls = 1  # on one rank torch copies, and calls nobody
        engine.finish_gradients()
        optimizer.step()
        engine.publish_weights()
        found.append(loss.item())
    return found
