"""Gradient checkpointing: what is kept of a layer's forward pass, and what the backward pass computes again.

    full         a layer keeps only its input, every n-th layer or all (parallel/recompute/every.py)
    selective    a layer keeps the results of the named ops and computes the cheap rest again
    modules      the named modules of a layer keep only their input; of others, which are cheap, not even the result is
                 kept by those who use it (parallel/recompute/kept.py)
    offload      with any of these or none: what is kept lies on the host until the backward pass needs it

What a recomputed pass adds to the tally is ignored, and what a layer decided in the first pass (`Where.decide`), such
as its routing, is there again in the second. The layers keep their names: their `forward` is replaced, no module is put
around them.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from meshwright.kernels.as_one import Results, kept_by
from meshwright.kernels.attention.blocks import attention_by_blocks
from meshwright.kernels.attention.tiles import ATTENTION as BY_TILES
from meshwright.kernels.matmul.grouped import grouped_product
from meshwright.kernels.matmul.products import onednn_product
from meshwright.parallel.recompute.every import every_nth
from meshwright.parallel.recompute.host_copies import HostCopies
from meshwright.parallel.recompute.kept import Kept, View, Whole, without_graph
from meshwright.parallel.tally import Tally
from meshwright.parallel.where import Where

_aten = torch.ops.aten

# Named in a run file; by device and by what `kernels/choose.py` chose, because each has another op.
SAVED_OPS: dict[str, frozenset[Any]] = {
    "attention": frozenset(
        {
            _aten._scaled_dot_product_flash_attention_for_cpu.default,
            _aten._scaled_dot_product_flash_attention.default,
            _aten._scaled_dot_product_efficient_attention.default,
            _aten._scaled_dot_product_cudnn_attention.default,
            _aten._flash_attention_forward.default,
            attention_by_blocks._opoverload,
            BY_TILES,
        }
    ),
    "matmul": frozenset(
        {
            _aten.mm.default,
            _aten.addmm.default,
            _aten.bmm.default,
            onednn_product._opoverload,
            grouped_product._opoverload,
        }
    ),
}


@dataclass(frozen=True)
class Recompute:
    """What is kept of the layers; plain values."""

    mode: str = "none"
    every: int = 1
    """full: every n-th layer."""
    save: tuple[str, ...] = ()
    """selective: names in `SAVED_OPS`."""
    whole: tuple[str, ...] = ()
    """modules: names within a layer of what keeps only its input; a layer that has none of a name passes it by."""
    remade: tuple[str, ...] = ()
    """modules: names within a layer of what is run again rather than its result kept."""
    offload: bool = False


def keep_less(layers: list[nn.Module], tally: Tally, how: Recompute, device: torch.device) -> Kept | None:
    """Make the layers keep what `how` says for the backward pass; return the hooks that they run under, if any."""
    kept = Kept(HostCopies(device) if how.offload else None)
    if how.mode == "full":
        recompute_layers(every_nth(layers, how.every), tally)
    elif how.mode == "selective":
        recompute_layers(layers, tally, how.save, kept)
    elif how.mode == "modules":
        recompute_modules(layers, tally, how.whole, how.remade, kept)
    if not how.offload and (how.mode != "modules" or not how.remade):
        return None
    for layer in layers:
        layer.forward = partial(_under, kept, layer.forward)
    return kept


def recompute_layers(
    layers: Iterable[nn.Module], tally: Tally, saved: Iterable[str] = (), kept: Kept | None = None
) -> None:
    """Make each layer recompute its forward pass in the backward pass, except for the ops named in `saved`.

    `kept` says where the results of those ops are kept.
    """
    keep = frozenset[Any]().union(*(SAVED_OPS[name] for name in saved))
    store = kept or Kept()

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        if not keep:
            return nullcontext(), _Entered(tally.paused)
        results: list[tuple[Any, Any]] = []
        first, again = _KeepResults(keep, store, results), _GiveBack(keep, store, results)
        return _Entered(*first.contexts()), _Entered(tally.paused, *again.contexts())

    for layer in layers:
        # Nothing draws random numbers from a generator, so there is no generator state to restore.
        recomputed = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
        layer.forward = partial(_remembering, recomputed)


def recompute_modules(
    layers: Iterable[nn.Module], tally: Tally, whole: Iterable[str], remade: Iterable[str], kept: Kept
) -> None:
    """Make the named modules of each layer recompute their forward pass, and let nobody keep what `remade` ones return.

    These may be one pipeline stage's layers, which need not have any of what the model has: that the model has all of
    it is looked at where the pattern is known (launcher/runfile/recompute_checks.py).
    """
    for modules in (dict(layer.named_modules()) for layer in layers):
        recompute_layers([modules[name] for name in whole if name in modules], tally)
        for name in remade:
            if name in modules:
                modules[name].forward = partial(kept.run_again_later, modules[name].forward)


def _under(kept: Kept, forward: Callable[..., Any], *args: Any) -> Any:
    with kept.layer():
        return forward(*args)


def _remembering(forward: Callable[..., Any], *args: Any) -> Any:
    """Give each call a memory of its own, which the recomputed pass finds in the same arguments."""
    return forward(*(arg.remembering() if isinstance(arg, Where) else arg for arg in args))


class _OfOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What both passes share: the named ops, what was kept of them, and that what is one is not looked into."""

    def __init__(self, ops: frozenset[Any], store: Kept, results: list[tuple[Any, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops, self.store, self.results, self.within_one = ops, store, results, False

    def contexts(self) -> tuple[Callable[[], AbstractContextManager[Any]], ...]:
        """Return what a pass runs under."""
        return self.begin, (lambda: kept_by(self.one))

    def begin(self) -> AbstractContextManager[Any]:
        """Begin a pass."""
        return self

    def one(self, name: str, compute: Callable[[], Results]) -> Results:
        """Answer for many ops that are one (kernels/as_one.py)."""
        results: Results = self.answer(name, partial(self._hidden, compute))
        return results

    @abstractmethod
    def answer(self, op: Any, compute: Callable[[], Any]) -> Any:
        """Return what an op returns."""

    def _hidden(self, compute: Callable[[], Results]) -> Results:
        self.within_one = True
        try:
            return compute()
        finally:
            self.within_one = False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        compute = partial(op, *args, **(kwargs or {}))
        return compute() if self.within_one else self.answer(op, compute)


class _KeepResults(_OfOps):  # type: ignore[no-untyped-call]
    """Keeps what the named ops return, in the order of their calls."""

    def answer(self, op: Any, compute: Callable[[], Any]) -> Any:
        result = compute()
        if op in self.ops:
            self.results.append((op, tree_map(self._keep, result)))
        return result

    def _keep(self, value: Any) -> Any:
        return self.store.pack(without_graph(value)) if isinstance(value, Tensor) else value


class _GiveBack(_OfOps):  # type: ignore[no-untyped-call]
    """Returns what was kept instead of calling the named ops again, in each backward pass of a graph that is kept."""

    def begin(self) -> AbstractContextManager[Any]:
        """Begin with the first of the results."""
        self.rest = iter(self.results)
        return self

    def answer(self, op: Any, compute: Callable[[], Any]) -> Any:
        if op not in self.ops:
            return compute()
        first, result = next(self.rest, (None, None))
        if op is not first:
            raise RuntimeError(f"the recomputed pass calls {op} where the first pass called {first}")
        return tree_map(self._take, result)

    def _take(self, value: Any) -> Any:
        return self.store.unpack(value) if isinstance(value, (Whole, View)) else value


class _Entered(AbstractContextManager[None]):
    """Contexts that are made anew each time: a graph that is kept is recomputed in each backward pass."""

    def __init__(self, *make: Callable[[], AbstractContextManager[Any]]) -> None:
        self.make, self.stacks = make, list[ExitStack]()

    def __enter__(self) -> None:
        stack = ExitStack()
        for make in self.make:
            stack.enter_context(make())
        self.stacks.append(stack)

    def __exit__(self, *exception: Any) -> None:
        self.stacks.pop().__exit__(*exception)
