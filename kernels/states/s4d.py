"""The diagonal state-space model S4D (Gu et al. 2022, "On the Parameterization and Initialization of Diagonal ...").

    h[t] = exp(dt A) h[t-1] + x[t]       y[t] = 2 Re(sum_N C' h[t]) + skip x[t]      C' = C (exp(dt A) - 1) / A

A is complex and the same for every token, so that a channel's output is a convolution with K[t] = 2 Re(sum_N C' exp(t
dt A)). Within a chunk of l tokens that is a product with a Toeplitz matrix; between chunks a state of N complex
numbers is passed on:

    y_i = sum_{j<=i} K[i - j] x_j + 2 Re(sum_N C' exp((i + 1) dt A) h)
    h' = exp(l dt A) h + sum_j exp((l - 1 - j) dt A) x_j

A document's start cuts all four. The tables of powers are made once for all chunks; those are gone through one by
one, and again in the backward. Letters: s seq_len, b micro batch, c channels, N pairs of conjugate states.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from meshwright.kernels.precision import at_least_fp32, without_autocast
from meshwright.kernels.states.chunks import sight
from meshwright.kernels.states.recomputed import chunk_by_chunk


class S4dParameters(NamedTuple):
    """What a channel's convolution is made of."""

    a: Complex[Tensor, "c N"]
    """Of negative real part."""
    c: Complex[Tensor, "c N"]
    dt: Float[Tensor, " c"]
    skip: Float[Tensor, " c"]


def s4d(
    x: Float[Tensor, "s b c"],
    parameters: S4dParameters,
    *,
    begins: Bool[Tensor, "s b"] | None = None,
    initial_state: Complex[Tensor, "b c N"] | None = None,
    chunk_size: int,
) -> tuple[Float[Tensor, "s b c"], Complex[Tensor, "b c N"]]:
    """Return y, in x's type, and the state after the last token."""
    batch, (channels, pairs) = x.shape[1], parameters.a.shape
    state = parameters.a.new_zeros(batch, channels, pairs) if initial_state is None else initial_state
    if not len(x):
        return torch.empty_like(x), state
    whole = x.shape[0] // chunk_size * chunk_size
    ys = []
    for rows, length in ((slice(0, whole), chunk_size), (slice(whole, x.shape[0]), x.shape[0] - whole)):
        if rows.start < rows.stop:
            with without_autocast(x):
                tables = _tables(parameters, length)
            cut = None if begins is None else begins[rows]
            y, state = chunk_by_chunk(_through_chunk, state, (x[rows],), tables, cut, length)
            ys.append(y)
    return ys[0] if len(ys) == 1 else torch.cat(ys), state


def _tables(parameters: S4dParameters, length: int) -> tuple[Tensor, ...]:
    """Return K [c, l], what comes into [c, N, l], goes out of [c, N, l] and across [c, N] a chunk, and the skip."""
    a, c, dt, skip = parameters
    rate = a * dt[:, None]
    weight = c * torch.expm1(rate) / a
    powers = (rate[..., None] * torch.arange(length + 1, device=a.device)).exp()  # [c, N, l + 1]
    weighted = 2 * weight[..., None] * powers
    return weighted[..., :-1].sum(1).real, weighted[..., 1:], powers[..., :-1].flip(-1), powers[..., -1], skip


def _through_chunk(
    h: Tensor, inputs: list[Tensor], shared: list[Tensor], begins: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y [l, b, c] of a chunk and the state after it."""
    x = at_least_fp32(inputs[0]).permute(1, 2, 0)  # [b, c, l]
    kernel, into, out_of, across, skip = shared
    position = torch.arange(x.shape[-1], device=x.device)
    distance = position[:, None] - position
    toeplitz = kernel[:, distance.clamp(min=0)].tril()  # [c, l, l]
    from_before = torch.einsum("cnl,bcn->bcl", into, h).real
    if begins is None:
        y, ending, fading = (toeplitz @ x.permute(1, 2, 0)).permute(2, 0, 1), x, h
    else:
        cut = sight(begins, x.dtype)
        y = ((toeplitz * cut.seen[:, None]) @ x[..., None])[..., 0]
        from_before = from_before * cut.from_before[:, None]
        ending, fading = x * cut.reaches_end[:, None], h * cut.untouched[:, None, None]
    y = y + from_before + x * skip[:, None]
    state = across * fading + torch.einsum("cnl,bcl->bcn", out_of, ending.to(out_of.dtype))
    return y.permute(2, 0, 1).to(inputs[0].dtype), state
