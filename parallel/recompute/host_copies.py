"""Memory that the backward pass needs, moved to the host during the forward pass and back before it is used.

A copy is made of a *storage*: what several layers keep of one result, as views of it or not, travels once.

    compute stream   layer 0    layer 1    layer 2   ...   backward 2   backward 1   backward 0
    side stream         copy 0 ->  copy 1 ->                <- copy 1    <- copy 0

On CUDA copies run on a stream of their own, from and to pinned memory. In the forward pass at most `IN_FLIGHT` results
wait for their copies; the compute stream waits for the oldest before one more is taken, so that the memory in use does
not depend on how far the host runs ahead. In the backward pass, which comes in the opposite order, bringing one copy
back also starts the `AHEAD` copies that were made just before it. On a CPU the host's memory is the device's: copies
are plain, and are there so that what a GPU does can be proved without one.
"""

import weakref
from collections import deque

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# Below this many bytes a copy costs more than it frees.
SMALLEST = 1024
IN_FLIGHT = 4
AHEAD = 2


class HostCopy:
    """The bytes of one storage on the host, and on the device again while the backward pass uses them."""

    def __init__(self, host: Tensor, before: "HostCopy | None") -> None:
        """Take the bytes, and the copy that was made before this one."""
        self.host = host
        self.uses = 0
        self.back: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        self._before = weakref.ref(before) if before is not None else None

    @property
    def before(self) -> "HostCopy | None":
        """Return the copy that was made before this one, if anything still needs it."""
        return self._before() if self._before is not None else None


class HostCopies:
    """Copies of storages of one device, each made at most once."""

    def __init__(self, device: torch.device) -> None:
        """Take the device whose memory is to be freed."""
        self.device = device
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._known: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[HostCopy]]] = {}
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._last: weakref.ref[HostCopy] | None = None
        self._alive: weakref.WeakSet[HostCopy] = weakref.WeakSet()

    @property
    def nbytes(self) -> int:
        """Return how many bytes the host holds."""
        return sum(copy.host.nbytes for copy in self._alive)

    def takes(self, tensor: Tensor) -> bool:
        """Say whether copying this tensor frees memory of the device."""
        owner = tensor if tensor._base is None else tensor._base
        return (
            type(tensor) is Tensor
            and not isinstance(owner, nn.Parameter)  # weights are there with or without a graph
            and tensor.layout == torch.strided
            and tensor.device.type == self.device.type
            and tensor.untyped_storage().nbytes() >= SMALLEST
        )

    def copy_of(self, tensor: Tensor) -> HostCopy:
        """Return the copy of this tensor's storage as it is now, with one user more."""
        storage = tensor.untyped_storage()
        # No other storage gets this identity while a weak reference is held; after a write it is another content.
        key = (storage._cdata, tensor._version)
        original, known = self._known.get(key, (None, None))
        copy = known() if known is not None else None
        if copy is None or original is None or original.expired():  # type: ignore[no-untyped-call]
            copy = HostCopy(self._to_host(tensor), self._last() if self._last is not None else None)
            self._last = weakref.ref(copy)
            self._known[key] = (StorageWeakRef(storage), self._last)  # type: ignore[no-untyped-call]
            self._alive.add(copy)
        copy.uses += 1
        return copy

    def take_back(self, copy: HostCopy) -> Tensor:
        """Return the bytes on the device to one user; they are let go of there when the last one has asked."""
        self._finish_leaving()
        self._start(copy)
        back = copy.back
        assert back is not None
        if copy.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(copy.arrived)
            at = copy.before
            for _ in range(AHEAD):
                if at is not None:
                    self._start(at)
                    at = at.before
        copy.uses -= 1
        if copy.uses <= 0:
            copy.back = copy.arrived = None
        return back

    def forget_the_dead(self) -> None:
        """Drop what is known of storages and copies that no longer exist."""
        self._known = {
            key: (original, copy)
            for key, (original, copy) in self._known.items()
            if not original.expired() and copy() is not None  # type: ignore[no-untyped-call]
        }

    def _to_host(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
        if self._stream is None:
            return source.clone()
        self._finish_leaving(all_but=IN_FLIGHT - 1)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            host.copy_(source, non_blocking=True)
            left = torch.cuda.Event()  # type: ignore[no-untyped-call]
            left.record(self._stream)
        self._leaving.append((source, left))
        return host

    def _finish_leaving(self, all_but: int = 0) -> None:
        """Let go of what was copied, once the compute stream is sure to use its memory only after the copy."""
        while len(self._leaving) > all_but:
            _, left = self._leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(left)

    def _start(self, copy: HostCopy) -> None:
        """Begin to bring bytes back, unless they are there or on their way."""
        if copy.back is not None:
            return
        if self._stream is None:
            copy.back = copy.host.clone()
            return
        back = torch.empty(copy.host.shape, dtype=copy.host.dtype, device=self.device)
        # Its memory may still be in use by what was computed before.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            back.copy_(copy.host, non_blocking=True)
            copy.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copy.arrived.record(self._stream)
        back.record_stream(self._stream)  # it may be dropped before it was used
        copy.back = back
