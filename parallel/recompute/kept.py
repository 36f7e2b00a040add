"""What autograd keeps of the layers for the backward pass, and where: on the device, on the host, or nowhere.

    kept as it is      weights, small tensors, what was written to in place, everything unless one of the next two is
                       asked for
    on the host        a copy of its storage (parallel/recompute/host_copies.py)
    nowhere            the result of a module that is cheap to run again from its input, such as a norm:

        x ---norm---> y ---q, k, v---> ...        q, k and v each would keep y; instead they keep "the norm of x",
        kept          not kept                    x being kept anyway, and y is made again when the first one asks

These are hooks on saved tensors (`torch.autograd.graph.saved_tensors_hooks`), so no layer knows of them. Within a
recomputed module autograd keeps nothing; its input is kept here.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from meshwright.parallel.recompute.host_copies import HostCopies, HostCopy


@dataclass(frozen=True, eq=False)
class Whole:
    """A tensor that is kept as it is, and how many writes in place it had seen."""

    tensor: Tensor
    writes: int

    @property
    def is_unwritten(self) -> bool:
        """Say whether nobody has written to it since."""
        return self.tensor._version == self.writes

    def get(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: if it was written to, which autograd itself does not look at where it has hooks.
        """
        if not self.is_unwritten:
            raise RuntimeError(
                f"a tensor of shape {list(self.tensor.shape)} that was kept for the backward pass was written to in "
                "place: write to a copy"
            )
        return self.tensor


def without_graph(tensor: Tensor) -> Tensor:
    """Return the tensor without its grad_fn, which would hold what holds it; both share one count of writes."""
    # Within a dispatch mode the key that shares the count is left out.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def as_it_is(tensor: Tensor) -> Whole:
    """Keep a tensor and how often it was written to."""
    return Whole(tensor if tensor.is_leaf else without_graph(tensor), tensor._version)


@dataclass(eq=False)
class Remade:
    """A result that is not kept: how to make it again, and the result while the backward pass uses it."""

    make: Callable[..., Tensor]
    result_writes: int
    """Writes in place that the result had seen when it was made: after another it cannot be made again."""
    inputs: tuple[Whole, ...]
    autocast: Callable[[], AbstractContextManager[Any]]
    packed: "tuple[Packed, ...] | None" = None
    uses: int = 0
    again: Tensor | None = None


@dataclass(frozen=True, eq=False)
class View:
    """A tensor as a place in a storage that is not kept on the device."""

    source: HostCopy | Remade
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


Packed = Whole | View


@dataclass
class Kept:
    """The hooks of one model's layers."""

    host: HostCopies | None = None
    _remade: dict[int, tuple[StorageWeakRef, Remade]] = field(default_factory=dict)
    _is_active: bool = False

    @contextmanager
    def layer(self) -> Iterator[None]:
        """Decide about everything that autograd keeps of what is computed inside, one layer."""
        if not torch.is_grad_enabled():
            yield
            return
        if self.host is not None:
            self.host.forget_the_dead()
        self._is_active = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                yield
        finally:
            self._is_active = False
            self._remade.clear()

    def run_again_later(self, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return `make(*inputs)`, which will not be kept but made again in the backward pass.

        A result that lies in an input's memory (`nn.Identity`, a view, a write in place) is kept as the input is.
        """
        y = make(*inputs)
        storage = y.untyped_storage()
        if self._is_active and all(x.untyped_storage()._cdata != storage._cdata for x in inputs):
            remade = Remade(make, y._version, tuple(map(as_it_is, inputs)), same_autocast(y.device.type))
            self._remade[storage._cdata] = (StorageWeakRef(storage), remade)  # type: ignore[no-untyped-call]
        return y

    def pack(self, tensor: Tensor) -> Packed:
        """Return what is held in place of a tensor."""
        source = self._remade_of(tensor) or (
            self.host.copy_of(tensor) if self.host is not None and self.host.takes(tensor) else None
        )
        if source is None:
            return as_it_is(tensor)
        return View(source, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: Packed) -> Tensor:
        """Return the tensor again, the same bits in the same layout."""
        if isinstance(packed, Whole):
            return packed.get()
        source = packed.source
        if isinstance(source, HostCopy):
            assert self.host is not None
            base = self.host.take_back(source)
        else:
            base = self._make_again(source)
        empty = torch.empty(0, dtype=packed.dtype, device=base.device)
        return empty.set_(base.untyped_storage(), packed.offset, packed.size, packed.stride)

    def _remade_of(self, tensor: Tensor) -> Remade | None:
        if not self._remade or type(tensor) is not Tensor:
            return None
        original, remade = self._remade.get(tensor.untyped_storage()._cdata, (None, None))
        if remade is None or original is None or original.expired():  # type: ignore[no-untyped-call]
            return None
        if tensor._version != remade.result_writes:
            return None
        if remade.packed is None:
            if not all(x.is_unwritten for x in remade.inputs):
                return None
            remade.packed, remade.inputs = tuple(self.pack(x.tensor) for x in remade.inputs), ()
        remade.uses += 1
        return remade

    def _make_again(self, remade: Remade) -> Tensor:
        if remade.again is None:
            assert remade.packed is not None
            with torch.no_grad(), remade.autocast():
                remade.again = remade.make(*(self.unpack(x) for x in remade.packed))
        again = remade.again
        remade.uses -= 1
        if remade.uses <= 0:
            remade.again = None
        return again


def same_autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes a context with the autocast of now: the backward pass runs outside of it."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)
