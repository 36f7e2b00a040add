"""Which sums over the ranks that have other samples are made in less than fp32: none should be.

    over tp, etp         activations too, in the type that they have      not looked at
    over data, copies    gradients, the loss, counts                      in fp32 at least, whatever the precision

On a CPU a reduce-scatter is an all-to-all whose pieces are added up (`parallel/collectives.py`): it is known by that
sum, as experts exchange rows over the same ranks in the type that these have. Where the ranks of the data are those of
etp too, they have one group, and nothing is looked at.

The error of a gradient does not tell: rounding its sum to bf16 adds less than the products were off by anyway.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.launcher.build import Run
from meshwright.parallel.rank_names import named

_SUMS = ("allreduce_", "reduce_scatter_", "_reduce_scatter_base_", "reduce_")
_EXCHANGE = "alltoall_base_"


class DtypeOfSums(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, notes such sums in `found`, in words."""

    def __init__(self, run: Run) -> None:
        """Take the run, whose parts say over which ranks their gradients are summed."""
        super().__init__()  # type: ignore[no-untyped-call]
        mesh = run.mesh
        axes = [axis for part in run.engine.parts.values() for axis in part.placement.data_axes(mesh)]
        self._ranks = {axis.ranks for axis in axes if axis.is_split} - {mesh.tp.ranks, mesh.etp.ranks}
        self._exchanged: dict[int, tuple[StorageWeakRef, str]] = {}
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the operator, and let it run."""
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name in _SUMS:
            self.found |= {line for _, line in self._narrow(args)}
        elif func.namespace == "c10d" and name == _EXCHANGE:
            for exchanged, line in self._narrow(args):
                storage = exchanged.untyped_storage()
                self._exchanged[storage._cdata] = StorageWeakRef(storage), line  # type: ignore[no-untyped-call]
        elif func is torch.ops.aten.sum.IntList_out:
            reference, line = self._exchanged.get(args[0].untyped_storage()._cdata, (None, ""))
            if reference is not None and not reference.expired():  # type: ignore[no-untyped-call]
                self.found.add(line)
        run: Callable[..., Any] = func
        return run(*args, **(kwargs or {}))

    def _narrow(self, args: Sequence[Any]) -> list[tuple[Tensor, str]]:
        """Return an operator's tensors of less than fp32, and a line for each, if its ranks have other samples.

        The first argument that is no tensor is the group.
        """
        group = next(value for value in args if isinstance(value, torch.ScriptObject))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
        if ranks not in self._ranks:
            return []
        given = [each for value in args for each in (value if isinstance(value, list) else [value])]
        return [
            (tensor, f"{str(tensor.dtype).removeprefix('torch.')} over {named(ranks)}")
            for tensor in given
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.itemsize < torch.float32.itemsize
        ]
