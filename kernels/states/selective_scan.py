"""The selective scan of Mamba-1 (Gu and Dao 2023, algorithm 2) in chunks: a decay for each entry of a state.

    h[t] = exp(dt[t] a) h[t-1] + dt[t] x[t] B[t]       y[t] = h[t] C[t] + skip x[t]          h [c, N], a [c, N]

Every entry decays by itself, so that there is no matrix product to make of it: a chunk's decays and inputs are
computed at once, [l, b, c, N], and its tokens then take one multiply-add each. Backward, from dy and dh' after the
chunk:

    dh[t] = dy[t] C[t] + exp(dt[t+1] a) dh[t+1]        of dt a: dh[t] exp(dt[t] a) h[t-1]        of dt x B: dh[t]

Kept for the backward are the inputs and the state before each chunk; at work is one chunk. Where a document starts the
decay is zero. Letters: s seq_len, b micro batch, c channels, N state_size.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meshwright.kernels.precision import at_least_fp32, without_autocast
from meshwright.kernels.states.chunks import stretches


def selective_scan(
    x: Float[Tensor, "s b c"],
    dt: Float[Tensor, "s b c"],
    a: Float[Tensor, "c N"],
    b: Float[Tensor, "s b N"],
    c: Float[Tensor, "s b N"],
    skip: Float[Tensor, " c"] | None = None,
    *,
    begins: Bool[Tensor, "s b"] | None = None,
    initial_state: Float[Tensor, "b c N"] | None = None,
    chunk_size: int,
) -> tuple[Float[Tensor, "s b c"], Float[Tensor, "b c N"]]:
    """Return y, in x's type, and the state after the last token, in at least fp32.

    dt is positive and a negative; `begins` says at which tokens the state is zero before they come.
    """
    y, states = chunked_selective_scan(x, dt, a, b, c, skip, begins, initial_state, chunk_size)
    return y, states[-1]


def selective_summary(
    x: Float[Tensor, "s b c"],
    dt: Float[Tensor, "s b c"],
    a: Float[Tensor, "c N"],
    b: Float[Tensor, "s b N"],
    *,
    begins: Bool[Tensor, "s b"] | None = None,
    chunk_size: int,
) -> tuple[Float[Tensor, "b c N"], Float[Tensor, "b c N"]]:
    """Return what a stretch of tokens does to a state before it: h' = decay h + state."""
    _, state = selective_scan(x, dt, a, b, torch.zeros_like(b), begins=begins, chunk_size=chunk_size)
    decay = (at_least_fp32(dt).sum(0)[..., None] * at_least_fp32(a)).exp()
    return decay if begins is None else decay * ~begins.any(0)[:, None, None], state


class _Chunk(NamedTuple):
    """The inputs of a chunk, in at least fp32, and its states."""

    x: Tensor  # [l, b, c]
    dt: Tensor
    a: Tensor  # [c, N]
    b: Tensor  # [l, b, N]
    c: Tensor
    decay: Tensor  # exp(dt a), [l, b, c, N]
    h: Tensor  # after each token


def _chunk(inputs: tuple[Tensor, ...], begins: Tensor | None, tokens: slice, before: Tensor) -> _Chunk:
    x, dt, a, b, c = (at_least_fp32(each if each.dim() == 2 else each[tokens]) for each in inputs)
    decay = (dt[..., None] * a).exp_()
    if begins is not None:
        decay *= ~begins[tokens][..., None, None]
    h = (dt * x)[..., None] * b[:, :, None]
    for after, fades in zip(h, decay, strict=True):
        before = after.addcmul_(fades, before)
    return _Chunk(x, dt, a, b, c, decay, h)


@torch.library.custom_op("meshwright::chunked_selective_scan", mutates_args=())
def chunked_selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    begins: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Compute y and the states before each chunk and after the last, [chunks + 1, b, c, N]."""
    y, states = _empty_results(x, a, chunk_size)
    states[0] = 0.0 if initial_state is None else initial_state
    with without_autocast(x):
        for at, stretch in enumerate(stretches(x.shape[0], chunk_size)):
            chunk = _chunk((x, dt, a, b, c), begins, stretch.tokens, states[at])
            states[at + 1] = chunk.h[-1]
            out = torch.matmul(chunk.h, chunk.c[..., None])[..., 0]
            y[stretch.tokens] = out if skip is None else out.addcmul_(chunk.x, at_least_fp32(skip))
    return y, states


@torch.library.custom_op("meshwright::chunked_selective_scan_gradients", mutates_args=())
def chunked_selective_scan_gradients(
    dy: Tensor,
    of_last: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    begins: Tensor | None,
    states: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, dt, a, b, c, skip and the first state, from those of y and of the last state."""
    of_x, of_dt, of_b, of_c = (each.new_empty(each.shape) for each in (x, dt, b, c))
    of_a = states.new_zeros(a.shape)
    of_skip, carried = of_a.new_zeros(a.shape[0]), of_last.clone()
    with without_autocast(x):
        for at, stretch in reversed(list(enumerate(stretches(x.shape[0], chunk_size)))):
            tokens = stretch.tokens
            chunk, above = _chunk((x, dt, a, b, c), begins, tokens, states[at]), at_least_fp32(dy[tokens])
            dh = above[..., None] * chunk.c[:, :, None]
            for t in range(stretch.length - 1, -1, -1):
                carried = dh[t].add_(carried).mul(chunk.decay[t])
            before = torch.cat([states[at][None], chunk.h[:-1]])
            of_rate = before.mul_(chunk.decay).mul_(dh)  # of dt a
            of_a += torch.einsum("lbcn,lbc->cn", of_rate, chunk.dt)
            of_u = torch.matmul(dh, chunk.b[..., None])[..., 0]  # of dt x
            of_dt[tokens] = torch.einsum("lbcn,cn->lbc", of_rate, chunk.a).addcmul_(of_u, chunk.x)
            of_b[tokens] = torch.matmul((chunk.dt * chunk.x)[:, :, None], dh)[:, :, 0]
            of_c[tokens] = torch.matmul(above[:, :, None], chunk.h)[:, :, 0]
            of_x[tokens] = of_u.mul_(chunk.dt) if skip is None else of_u.mul_(chunk.dt).addcmul_(above, skip)
            of_skip += (above * chunk.x).sum((0, 1))
    return of_x, of_dt, of_a, of_b, of_c, of_skip, carried


def _empty_results(x: Tensor, a: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    chunks = -(-x.shape[0] // chunk_size)
    return x.new_empty(x.shape), x.new_empty((chunks + 1, x.shape[1], *a.shape), dtype=wide)


@chunked_selective_scan.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    begins: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    return _empty_results(x, a, chunk_size)


@chunked_selective_scan_gradients.register_fake
def _(
    dy: Tensor,
    of_last: Tensor,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    begins: Tensor | None,
    states: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_x, of_dt, of_b, of_c = (each.new_empty(each.shape) for each in (x, dt, b, c))
    of_a, of_skip = states.new_empty(a.shape), states.new_empty(a.shape[0])
    return of_x, of_dt, of_a, of_b, of_c, of_skip, states.new_empty(states.shape[1:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, of_states: Tensor | None) -> tuple[Tensor | None, ...]:
    x, dt, a, b, c, skip, begins, initial_state, states = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    of_last = torch.zeros_like(states[0]) if of_states is None else of_states[-1]  # of the states only the last is out
    given = (x, dt, a, b, c, skip, begins, states, ctx.chunk_size)
    of_x, of_dt, of_a, of_b, of_c, of_skip, of_first = chunked_selective_scan_gradients(dy, of_last, *given)
    of_skip = None if skip is None else of_skip.to(skip.dtype)
    of_first = None if initial_state is None else of_first.to(initial_state.dtype)
    return of_x, of_dt, of_a.to(a.dtype), of_b, of_c, of_skip, None, of_first, None


chunked_selective_scan.register_autograd(_backward, setup_context=_save)
