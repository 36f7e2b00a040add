"""Recurrences over a sample whose chunks lie on the ranks of cp: what each chunk needs of those before it.

A rank holds two chunks (parallel/context/order.py). A convolution of k taps needs the last k - 1 tokens of the chunk
before each; a recurrence needs the state that all chunks before leave. What a chunk does to a state is linear, so
that a rank can say it without knowing the state: h' = decay h + state.

    rank            0          1
    chunks          0   3      1   2         each: its decay, and its state from zero
    one all-gather  0 3 1 2                  then each rank folds, in the order of chunks:
                                             h = 0;   before[c] = h,   h = decay[c] h + state[c]

`decay` is a number for each head (Mamba-2) or channel (Mamba-1), or a matrix (gated delta net): `apply` says which.
Where a document starts within a chunk its decay is 0, and its state what the tokens since the last start leave; so the
fold is cut by itself. The gradients go back through the same sums: a reduce-scatter.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from meshwright.kernels.precision import at_least_fp32
from meshwright.parallel.collectives import gather
from meshwright.parallel.context.order import chunks_of, zigzag_part
from meshwright.parallel.mesh import Axis
from meshwright.parallel.where import Where

Apply = Callable[[Tensor, Tensor], Tensor]
Summary = tuple[Tensor, Tensor]
"""(decay, state) of a chunk."""


def document_begins(where: Where, cp: Axis) -> Bool[Tensor, "s b"] | None:
    """Return at which tokens of a mixer a document starts; None where documents are not told apart.

    The rows of a sample are counted, not its positions: a layer may be given some of the tokens (Mixture-of-Depths).
    """
    if not where.mask_documents:
        return None
    return where.derive("state/begins", lambda: zigzag_part(_begins(where.document_whole), cp))


def _begins(document: Int[Tensor, "s b"]) -> Bool[Tensor, "s b"]:
    changed = document[1:] != document[:-1]
    return torch.cat([torch.zeros_like(changed[:1]), changed]) if len(changed) else torch.zeros_like(document).bool()


def states_before(chunks: list[Summary], cp: Axis, apply: Apply) -> list[Tensor]:
    """Return the state that comes into each of this rank's two chunks; the sample begins with zeros.

    One all-gather over cp; differentiable. `chunks` are this rank's in the order in which it holds them.
    """
    mine = torch.stack([torch.cat([at_least_fp32(part).flatten() for part in chunk]) for chunk in chunks])
    everyone = gather(mine, cp)  # two rows of each rank
    decay_like, state_like = chunks[0]
    held = [chunk for rank in range(cp.size) for chunk in chunks_of(rank, cp.size)]
    h, found = torch.zeros_like(at_least_fp32(state_like)), {}
    low, high = chunks_of(cp.rank, cp.size)
    for chunk in range(high + 1):
        if chunk in (low, high):
            found[chunk] = h
        if chunk < high:
            decay, state = torch.split(everyone[held.index(chunk)], [decay_like.numel(), state_like.numel()])
            h = apply(decay.view_as(decay_like), h) + state.view_as(state_like)
    return [found[low], found[high]]


def halos(
    inputs: Sequence[Float[Tensor, "s_local b _"]], width: int, cp: Axis, where: Where
) -> list[list[Float[Tensor, "width b _"]]]:
    """Return the `width` tokens of each input before each of this rank's two chunks, zeros before the sample.

    One all-gather over cp; differentiable. Chunks may be shorter than `width`: a halo is then of several. Tokens that a
    document's start separates from the chunk are zeros too.
    """
    length = inputs[0].shape[0] // 2
    most = min(width, length)
    ends = [torch.cat([x[length - most : length], x[2 * length - most :]]) for x in inputs]
    everyone = torch.unflatten(gather(torch.cat(ends, -1), cp), 0, (2 * cp.size, most))
    held = [chunk for rank in range(cp.size) for chunk in chunks_of(rank, cp.size)]
    in_order = everyone[[held.index(chunk) for chunk in range(2 * cp.size)]]
    before = []
    for chunk in chunks_of(cp.rank, cp.size):
        halo = _last(in_order[:chunk].flatten(0, 1), width)
        if where.mask_documents:
            halo = halo * _same_document(where, chunk * length, width)[..., None]
        before.append(list(torch.split(halo, [x.shape[-1] for x in inputs], -1)))
    return before


def _last(x: Shaped[Tensor, "s b *rest"], width: int) -> Shaped[Tensor, "width b *rest"]:
    """Return the last rows, behind zeros where there are not as many."""
    missing = x.new_zeros(max(width - len(x), 0), *x.shape[1:])
    return torch.cat([missing, x[max(len(x) - width, 0) :]])


def _same_document(where: Where, position: int, width: int) -> Bool[Tensor, "width b"]:
    """Say which of the tokens before a position no document's start separates from the last of them."""
    changed = _last(_begins(where.document_whole)[:position], width)
    later = changed.flip(0).cumsum(0).flip(0) - changed.int()  # starts after each
    return later == 0


def scale_state(decay: Float[Tensor, "*of_state"], h: Float[Tensor, "*of_state _ _"]) -> Float[Tensor, "*of_state _ _"]:
    """Return a state [..., d, N] with one decay for each matrix, as Mamba-2 has it."""
    return decay[..., None, None] * h


def scale_entries(decay: Float[Tensor, "*of_state"], h: Float[Tensor, "*of_state"]) -> Float[Tensor, "*of_state"]:
    """Return a state with a decay for each entry, as Mamba-1 has it."""
    return decay * h


def turn_state(
    decay: Float[Tensor, "*of_state d d"], h: Float[Tensor, "*of_state d e"]
) -> Float[Tensor, "*of_state d e"]:
    """Return a state [..., d, e] multiplied by a matrix [d, d], as the gated delta net has it."""
    return decay @ h
