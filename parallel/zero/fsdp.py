"""ZeRO-2 and ZeRO-3 through torch's FSDP2, over plain (already split) parameters.

    ZeRO-2   weights gathered for a step's first forward pass and kept until they are updated
    ZeRO-3   gathered for each pass, forward and backward; never all at once

Under both, weights, gradients and moments lie in dim-0 parts between steps. Gradients are summed with a divide
factor of 1: any other would be applied twice on a shard group of one rank (checked against the source,
`foreach_reduce`), and gloo lacks the operation that it needs.

FSDP2 sums over the axis that it shards over. What else must be summed (copies of the sharded state in hybrid
sharding, norms and routers under tensor parallelism) is summed by us once a step, when each rank is left with its
part: that is 1/n of the bytes, however many micro-batches there were.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from meshwright.parallel.collectives import all_reduce, start_reduce_scatter
from meshwright.parallel.mesh import Axis, Mesh
from meshwright.parallel.placement import Placement
from meshwright.parallel.zero.part import Part, make_part


def shard_modules(
    units: list[nn.Module],
    axes: dict[nn.Parameter, Axis],
    *,
    stage: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> list[FSDPModule]:
    """Wrap each unit, inner ones first, so that the parameters in `axes` (and no others) are sharded.

    A unit holds what no unit inside it holds; all of that has one axis. A unit of which others hold everything, as in
    the middle of a pipeline, is wrapped too: a schedule speaks to the units of its stage through it. `dtype` is the
    type of the gathered weights where it differs from that of the held ones (bf16 of fp32). Returned are the units
    that hold something.
    """
    meshes: dict[tuple[int, ...], DeviceMesh] = {}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    taken: set[nn.Parameter] = set()
    wrapped: list[FSDPModule] = []
    # Asked before the first is wrapped, which puts other tensors in the places of the parameters.
    to_shard = [[parameter for parameter in unit.parameters() if parameter in axes] for unit in units]
    for unit, sharded in zip(units, to_shard, strict=True):
        inside = set(unit.parameters())
        if not sharded:
            continue
        own = set(sharded) - taken
        taken |= own
        axis = axes[next(iter(own or sharded))]
        assert all(axes[parameter].ranks == axis.ranks for parameter in own), "one unit has one axis"
        if axis.ranks not in meshes:
            assert axis.group is not None
            meshes[axis.ranks] = DeviceMesh.from_group(axis.group, device.type, mesh_dim_names=(axis.name,))
        fully_shard(
            unit,
            mesh=meshes[axis.ranks],
            reshard_after_forward=stage == 3,
            mp_policy=policy,
            ignored_params={parameter for parameter in inside if parameter not in axes},
        )
        assert isinstance(unit, FSDPModule)
        unit.set_reshard_after_backward(stage == 3)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        wrapped += [unit] if own else []
    return wrapped


class CountedReduceScatter:
    """What FSDP2 reduces a unit's gradients with (its `ReduceScatter` protocol), and how often it did."""

    def __init__(self) -> None:
        """Begin at 0."""
        self.calls = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for what is sent or received."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        """Sum everyone's piece for this rank."""
        assert op == dist.ReduceOp.SUM, f"gradients are summed; asked for was {op}"
        self.calls += 1
        pending = start_reduce_scatter(output_tensor, input_tensor, group)
        return pending if async_op else pending.wait()


class FsdpEngine:
    """Parts and gradients of parameters that FSDP2 shards."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        wrapped: list[FSDPModule],
        local_shapes: dict[str, tuple[int, ...]],
        table: dict[str, Placement],
        mesh: Mesh,
        *,
        at_end: bool = False,
    ) -> None:
        """Take the sharded parameters, the modules that gather them, and the shapes that they had before.

        `at_end`: a schedule that takes backwards apart runs the units, and has them reduced when it is through.
        """
        self.parameters, self.wrapped, self.mesh = parameters, wrapped, mesh
        self._reductions = [CountedReduceScatter() for _ in wrapped]
        self._micro_batches, self._at_end = 0, at_end
        for unit, reduction in zip(wrapped, self._reductions, strict=True):
            unit.set_custom_reduce_scatter(reduction)  # type: ignore[arg-type]  # its base class has no public name
        self.parts: dict[str, Part] = {}
        for name, parameter in parameters.items():
            assert isinstance(parameter.data, DTensor)
            held = parameter.detach().to_local()  # type: ignore[attr-defined]
            self.parts[name] = make_part(held, local_shapes[name], table[name], mesh, is_zero_part=True)

    def start_step(self, num_micro_batches: int) -> None:
        """Begin with empty gradients; each unit is reduced after every micro-batch, or at the step's end."""
        self._micro_batches = num_micro_batches
        for reduction in self._reductions:
            reduction.calls = 0
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.parts[name].parameter.grad = None  # the same memory: held on to, it would lie beside the new sums

    def finish_gradients(self) -> None:
        """Give each part its gradient; FSDP2 waited for its reductions when the backward pass ended."""
        calls = [reduction.calls for reduction in self._reductions]
        expected = 1 if self._at_end else self._micro_batches
        assert calls == [expected] * len(calls), (
            f"in {self._micro_batches} micro-batches the units were reduced {calls} times"
        )
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            assert isinstance(gradient, DTensor), f"{name} got no gradient in this step"
            self.parts[name].parameter.grad = gradient.to_local()
        for axes, gradients in self._also_summed():
            flat = torch.cat([gradient.view(-1) for gradient in gradients])
            for axis in axes:
                all_reduce(flat, axis)
            for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def _also_summed(self) -> list[tuple[tuple[Axis, ...], list[Tensor]]]:
        """Return the gradients that must be summed over more axes than the one of their shards, by these axes."""
        groups: dict[tuple[tuple[int, ...], ...], tuple[tuple[Axis, ...], list[Tensor]]] = {}
        for part in self.parts.values():
            *others, _ = (*part.placement.grad_sum, *part.placement.data_axes(self.mesh))
            axes = tuple(axis for axis in others if axis.is_split)
            gradient = part.parameter.grad
            assert gradient is not None
            if axes:
                groups.setdefault(tuple(axis.ranks for axis in axes), (axes, []))[1].append(gradient)
        return list(groups.values())

    def publish_weights(self) -> None:
        """Let go of the gathered weights that ZeRO-2 keeps.

        Parts are the parameters' own memory, so what the optimizer wrote is gathered when it is next used.
        """
        for unit in self.wrapped:
            unit.reshard()
