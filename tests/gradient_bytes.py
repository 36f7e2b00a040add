"""Bytes of gradients that live at once: those in every place where a gradient lies, and those once seen there.

    .grad of a parameter, of a part        the rows of buckets          FSDP2's whole gradients, whole sums and parts
    what is added to one of these          what FSDP2 sends and receives

A gradient that nothing names any more counts for as long as its memory lives. Looked at whenever something is written
into one of these places, which is when two of them live.
"""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from engine_cases import forward_backward, start
from parity_samples import Sample
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.kernels.limits import USUAL, Limits
from meshwright.launcher.build import held_dtype, plan_of
from meshwright.launcher.runfile.footprint import StateBytes, state_of_rank
from meshwright.launcher.stages import stages_of
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.zero.engine import ZeroEngine

WRITES = ("add_", "copy_", "_foreach_add_", "_foreach_copy_", "chunk_cat")


class GradientBytes(TorchDispatchMode):
    """Knows the most bytes of gradients that lived while it was on, and of the weights that FSDP2 had gathered."""

    def __init__(self, model: torch.nn.Module, engine: ZeroEngine) -> None:
        """Begin with none."""
        super().__init__()
        self.parameters, self.parts = list(model.parameters()), list(engine.parts.values())
        self.buckets = [bucket for inner in engine._engines for bucket in getattr(inner, "buckets", [])]
        units = [unit for inner in engine._engines for unit in getattr(inner, "wrapped", [])]
        groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
        self.sharded = [one for group in groups for one in group.fsdp_params]
        for group in groups:
            group.post_backward = self._seen_before(group.post_backward)
        for inner in engine._engines:
            for reduction in getattr(inner, "_reductions", []):
                reduction.allocate = self._seen_by(reduction.allocate)
        self.most = self.gathered = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def _seen_by(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def seen(size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
            made = allocate(size, dtype=dtype, device=device)
            self._see(made)
            self._count()
            return made

        return seen

    def _seen_before(self, reduce: Callable[..., None]) -> Callable[..., None]:
        def seen(*args: Any) -> None:
            self._count()  # from here on no parameter names them
            reduce(*args)

        return seen

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op; where it may have written a gradient, count."""
        result = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if name in WRITES:
            self._count()
            if name == "add_" and isinstance(args[1], Tensor) and args[0].untyped_storage()._cdata in self._seen:
                self._see(args[1])
                self._count()
        return result

    def _see(self, tensor: Tensor | None) -> None:
        if tensor is not None:
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            storage = local.untyped_storage()
            known = self._seen.get(storage._cdata)
            if known is None or known[0].expired():
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def _living(self) -> int:
        self._seen = {key: known for key, known in self._seen.items() if not known[0].expired()}
        return sum(nbytes for _, nbytes in self._seen.values())

    def _count(self) -> None:
        for bucket in self.buckets:
            self._see(bucket.rows)
            self._see(bucket.mine)
        gathered = 0
        for one in self.sharded:
            whole = getattr(one, "_unsharded_param", None)
            for tensor in (
                one.sharded_param.grad,
                one.unsharded_accumulated_grad,
                whole if whole is None else whole.grad,
            ):
                self._see(tensor)
            gathered += 0 if whole is None else whole.untyped_storage().nbytes()
        for held in (*self.parameters, *(part.parameter for part in self.parts)):
            self._see(held.grad)
        if self._living() > self.most:
            time.sleep(0.005)  # a thread of gloo's may hold on to what it has sent for a moment
            self.most = max(self.most, self._living())
        self.gathered = max(self.gathered, gathered)


class Found(NamedTuple):
    """The most bytes that lived on one rank in a step, what is counted for it, and its weights."""

    gradients: int
    gathered: int
    counted: StateBytes
    weights: int


def most_in_a_step(mesh: Mesh, drawn: Sample, precision: str = "fp32", limits: Limits = USUAL) -> Found:
    """Look at the second of two steps of this sample on this rank, which finds what the first left."""
    run_file = drawn.run_file(precision=precision)
    run = start(mesh, run_file.model, plan_of(run_file, limits), dtype=held_dtype(run_file), stages=stages_of(run_file))
    forward_backward(run, 0, drawn.micro_batch)
    run.engine.publish_weights()
    gc.disable()
    try:
        with GradientBytes(run.model, run.engine) as seen:
            forward_backward(run, 1, drawn.micro_batch)
    finally:
        gc.enable()
    counted = state_of_rank(run_file, drawn.world, mesh.pp.rank, limits)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in run.model.parameters())
    return Found(seen.most, seen.gathered, counted, weights)
