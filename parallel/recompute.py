"""Gradient checkpointing: what is kept of a layer's forward pass, and what the backward pass computes again.

    full         a layer keeps only its input, every n-th layer or all
    selective    a layer keeps the results of the named ops and computes the cheap rest again

What a recomputed pass adds to the tally is ignored, and what a layer decided in the first pass (`Where.decide`), such
as its routing, is there again in the second. The layers keep their names: their `forward` is replaced, no module is put
around them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from meshwright.kernels.attention_blocks import attention_by_blocks
from meshwright.kernels.grouped import grouped_product
from meshwright.kernels.products import onednn_product
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
    keep = frozenset[Any]().union(*(SAVED_OPS[name] for name in saved))

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        if not keep:
            return nullcontext(), tally.paused()
        first, again = create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
        return first, _both(again, tally.paused())

    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE

    for layer in layers:
        # Nothing draws random numbers from a generator, so there is no generator state to restore.
        recomputed = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
        layer.forward = partial(_remembering, recomputed)


def _remembering(forward: Callable[..., Any], *args: Any) -> Any:
    """Give each call a memory of its own, which the recomputed pass finds in the same arguments."""
    return forward(*(arg.remembering() if isinstance(arg, Where) else arg for arg in args))


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield
