"""Bytes that are held: every storage that was made, and whether it still exists."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """Knows every storage that was made while it was on."""

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and look at what it returns."""
        result = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return result

    def alive(self, but: Collection[int] = ()) -> int:
        """Return the bytes of those that still exist, but for some."""
        made = self.made.items()
        return sum(nbytes for key, (storage, nbytes) in made if key not in but and not storage.expired())

    def living(self) -> list[torch.UntypedStorage]:
        """Return those that still exist; FSDP2 empties a storage that it will fill again, whose size is then 0."""
        found = (torch.UntypedStorage._new_with_weak_ptr(weak.cdata) for weak, _ in self.made.values())
        return [storage for storage in found if storage is not None]


class Peak(Storages):
    """Knows, too, the most bytes that existed at any time."""

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and count."""
        result = super().__torch_dispatch__(op, types, args, kwargs)
        self.most = max(self.most, self.alive())
        return result
