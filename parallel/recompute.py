"""Gradient checkpointing: what is kept of a layer's forward pass, and what the backward pass computes again.

    full         a layer keeps only its input (and its routing), every n-th layer or all
    selective    a layer keeps the results of the named ops and computes the cheap rest again

Routing decisions are always kept: recomputed scores could round differently and send a token to another expert
than the one whose gradient is due. What a recomputed pass adds to the tally is ignored.
The layers keep their names: their `forward` is replaced, no module is put around them.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from meshwright.kernels.attention_blocks import attention_by_blocks
from meshwright.kernels.grouped import grouped_product
from meshwright.kernels.products import onednn_product
from meshwright.parallel.tally import Tally

_aten = torch.ops.aten
_ROUTING = {_aten.topk.default, _aten.sort.stable, _aten.sort.default}

# Named in a run file; by device and by what `kernels/choose.py` chose, because each has another op.
SAVED_OPS: dict[str, frozenset[Any]] = {
    "attention": frozenset(
        {
            _aten._scaled_dot_product_flash_attention_for_cpu.default,
            _aten._scaled_dot_product_flash_attention.default,
            _aten._scaled_dot_product_efficient_attention.default,
            _aten._scaled_dot_product_cudnn_attention.default,
            attention_by_blocks._opoverload,
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


def recompute_layers(layers: Iterable[nn.Module], tally: Tally, saved: Iterable[str] = ()) -> None:
    """Make each layer recompute its forward pass in the backward pass, except for the ops named in `saved`."""
    keep = _ROUTING.union(*(SAVED_OPS[name] for name in saved))
    for layer in layers:
        layer.forward = _recomputed(layer.forward, frozenset(keep), tally)


def _recomputed(forward: Callable[..., Any], keep: frozenset[Any], tally: Tally) -> Callable[..., Any]:
    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, again = create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
        return first, _both(again, tally.paused())

    # Nothing draws random numbers from a generator, so there is no generator state to restore.
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class _both(AbstractContextManager[None]):  # noqa: N801 - used as a function
    def __init__(self, *managers: AbstractContextManager[Any]) -> None:
        self._managers, self._stack = managers, ExitStack()

    def __enter__(self) -> None:
        for manager in self._managers:
            self._stack.enter_context(manager)

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
