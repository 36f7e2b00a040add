"""Which sums over the ranks that have other samples are made in less than fp32: none should be.

    over tp, etp         activations too, in the type that they have      not looked at
    over data, copies    gradients, the loss, counts                      in fp32 at least, whatever the precision

Where the ranks of the data are those of etp too, they have one group, and nothing is looked at.

The error of a gradient does not tell: rounding its sum to bf16 adds less than the products were off by anyway.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.launcher.build import Run
from meshwright.parallel.rank_names import named

_SUMS = ("allreduce_", "reduce_scatter_", "_reduce_scatter_base_", "reduce_")


class DtypeOfSums(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, notes such sums in `found`, in words."""

    def __init__(self, run: Run) -> None:
        """Take the run, whose parts say over which ranks their gradients are summed."""
        super().__init__()  # type: ignore[no-untyped-call]
        mesh = run.mesh
        axes = [axis for part in run.engine.parts.values() for axis in part.placement.data_axes(mesh)]
        self._ranks = {axis.ranks for axis in axes if axis.is_split} - {mesh.tp.ranks, mesh.etp.ranks}
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the operator, and let it run."""
        if func.namespace == "c10d" and func.overloadpacket.__name__ in _SUMS:
            self._look(args)
        run: Callable[..., Any] = func
        return run(*args, **(kwargs or {}))

    def _look(self, args: Sequence[Any]) -> None:
        """Note the types of what is summed; the first argument that is no tensor is the group."""
        given = [each for value in args for each in (value if isinstance(value, list) else [value])]
        tensors = [value for value in given if isinstance(value, Tensor)]
        group = next(value for value in args if isinstance(value, torch.ScriptObject))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
        if ranks not in self._ranks:
            return
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.itemsize < torch.float32.itemsize:
                self.found.add(f"{str(tensor.dtype).removeprefix('torch.')} over {named(ranks)}")
