"""A recurrence over chunks that keeps the state before each chunk and computes the rest again in the backward.

    y_1, h_1 = step(h_0, chunk 1 of the inputs, shared);   y_2, h_2 = step(h_1, chunk 2, shared);   ...

For recurrences whose chunk is a few products that autograd differentiates well: what it keeps of them lives as long as
one chunk's backward. `step` is a function of its arguments alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from meshwright.kernels.precision import without_autocast
from meshwright.kernels.states.chunks import Stretch, stretches

Step = Callable[[Tensor, list[Tensor], list[Tensor], Tensor | None], tuple[Tensor, Tensor]]
"""(state, rows of the inputs, shared, rows of begins) -> (rows of y, state)."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def chunk_by_chunk(
    step: Step,
    state: Tensor,
    inputs: Sequence[Tensor],
    shared: Sequence[Tensor],
    begins: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Return y [s, ...] of all tokens and the state after the last; differentiable in state, inputs and shared.

    `inputs` and `begins` are cut along their first dim, `shared` is whole in each chunk.
    """
    how = (step, len(inputs), stretches(inputs[0].shape[0], chunk_size))
    with without_autocast(inputs[0]):
        y, last = _ChunkByChunk.apply(how, begins, state, *inputs, *shared)  # type: ignore[no-untyped-call]
    return y, last


class _ChunkByChunk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: tuple[Step, int, list[Stretch]], begins: Tensor | None, state: Tensor, *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        step, cut, work = how
        ys, before = [], []
        for stretch in work:
            before.append(state)
            y, state = step(state, _rows(given[:cut], stretch), list(given[cut:]), _begun(begins, stretch))
            ys.append(y)
        ctx.how = how
        ctx.save_for_backward(begins, *before, *given)
        return torch.cat(ys), state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        step, cut, work = ctx.how
        begins, *saved = ctx.saved_tensors
        before, given = saved[: len(work)], saved[len(work) :]
        dy, carried = grads
        of_inputs = [torch.empty_like(each) for each in given[:cut]]
        of_shared = [torch.zeros_like(each) for each in given[cut:]]
        for stretch, state in zip(reversed(work), reversed(before), strict=True):
            leaves = [each.detach().requires_grad_() for each in (state, *_rows(given[:cut], stretch), *given[cut:])]
            with torch.enable_grad(), without_autocast(dy):
                out = step(leaves[0], leaves[1 : 1 + cut], leaves[1 + cut :], _begun(begins, stretch))
            found = torch.autograd.grad(out, leaves, (dy[stretch.tokens], carried), materialize_grads=True)
            carried = found[0]
            for whole, part in zip(of_inputs, found[1 : 1 + cut], strict=True):
                whole[stretch.tokens] = part
            for total, part in zip(of_shared, found[1 + cut :], strict=True):
                total += part
        return None, None, carried, *of_inputs, *of_shared


def _rows(inputs: Sequence[Tensor], stretch: Stretch) -> list[Tensor]:
    return [each[stretch.tokens] for each in inputs]


def _begun(begins: Tensor | None, stretch: Stretch) -> Tensor | None:
    return None if begins is None else begins[stretch.tokens]
