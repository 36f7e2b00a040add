"""The recurrences once more, one token at a time: what the chunked kernels are held to, outputs and gradients.

Each goes token by token in at least fp32 and forgets its state where a document begins.
Letters: s seq_len, b micro batch, n heads, d head_dim, g groups, N state_size, c channels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from meshwright.kernels.precision import at_least_fp32


def causal_conv(
    x: Float[Tensor, "s b c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, " c"] | None = None,
    *,
    halo: Float[Tensor, "k_less_one b c"] | None = None,
    begins: Bool[Tensor, "s b"] | None = None,
    silu: bool = True,
) -> Float[Tensor, "s b c"]:
    """Keep the last k tokens, forget them where a document begins, and weigh them."""
    taps = weight.shape[1]
    window = list(at_least_fp32(x.new_zeros(taps - 1, *x.shape[1:]) if halo is None else halo))
    rows = []
    for t, token in enumerate(at_least_fp32(x)):
        if begins is not None:
            window = [each * ~begins[t][:, None] for each in window]
        window = [*window, token]
        y = sum((weight[:, j] * each for j, each in enumerate(window)), torch.zeros_like(token))
        y = y if bias is None else y + bias
        rows.append(F.silu(y) if silu else y)
        window = window[1:]
    return torch.stack(rows).to(x.dtype)


def ssd(
    x: Float[Tensor, "s b n d"],
    dt: Float[Tensor, "s b n"],
    a: Float[Tensor, " n"],
    b: Float[Tensor, "s b g N"],
    c: Float[Tensor, "s b g N"],
    skip: Float[Tensor, " n"] | None = None,
    *,
    begins: Bool[Tensor, "s b"] | None = None,
    initial_state: Float[Tensor, "b n d N"] | None = None,
) -> tuple[Float[Tensor, "s b n d"], Float[Tensor, "b n d N"]]:
    """h = exp(dt a) h + dt x B^T; y = h C + skip x."""
    heads = x.shape[2] // b.shape[2]
    h = _zeros(x, x.shape[1], x.shape[2], x.shape[3], b.shape[3]) if initial_state is None else initial_state
    rows = []
    for t in range(x.shape[0]):
        x_t, dt_t = at_least_fp32(x[t]), at_least_fp32(dt[t])
        b_t, c_t = (at_least_fp32(each[t]).repeat_interleave(heads, 1) for each in (b, c))
        h = _forgotten(h, begins, t) * (dt_t * a).exp()[..., None, None]
        h = h + (dt_t[..., None] * x_t)[..., None] * b_t[:, :, None]
        y = (h * c_t[:, :, None]).sum(-1)
        rows.append(y if skip is None else y + skip[:, None] * x_t)
    return torch.stack(rows).to(x.dtype), h


def _forgotten(h: Tensor, begins: Tensor | None, t: int) -> Tensor:
    return h if begins is None else h * ~begins[t].view(-1, *[1] * (h.dim() - 1))


def _zeros(x: Tensor, *shape: int) -> Tensor:
    return at_least_fp32(x[:0]).new_zeros(shape)


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
) -> tuple[Float[Tensor, "s b c"], Float[Tensor, "b c N"]]:
    """h = exp(dt a) h + dt x B; y = h C + skip x."""
    h = _zeros(x, x.shape[1], *a.shape) if initial_state is None else initial_state
    rows = []
    for t in range(x.shape[0]):
        x_t, dt_t, b_t, c_t = (at_least_fp32(each[t]) for each in (x, dt, b, c))
        h = _forgotten(h, begins, t) * (dt_t[..., None] * a).exp() + (dt_t * x_t)[..., None] * b_t[:, None]
        y = (h * c_t[:, None]).sum(-1)
        rows.append(y if skip is None else y + skip * x_t)
    return torch.stack(rows).to(x.dtype), h


def gated_delta(
    q: Float[Tensor, "s b n d"],
    k: Float[Tensor, "s b n d"],
    v: Float[Tensor, "s b n e"],
    beta: Float[Tensor, "s b n"],
    g: Float[Tensor, "s b n"],
    *,
    begins: Bool[Tensor, "s b"] | None = None,
    initial_state: Float[Tensor, "b n d e"] | None = None,
) -> tuple[Float[Tensor, "s b n e"], Float[Tensor, "b n d e"]]:
    """h = exp(g) h; h = h + beta k (v - k^T h)^T; y = q^T h."""
    h = _zeros(v, *k.shape[1:], v.shape[-1]) if initial_state is None else initial_state
    rows = []
    for t in range(v.shape[0]):
        q_t, k_t, v_t, beta_t, g_t = (at_least_fp32(each[t]) for each in (q, k, v, beta, g))
        h = _forgotten(h, begins, t) * g_t.exp()[..., None, None]
        missing = v_t - (k_t[..., None] * h).sum(-2)
        h = h + beta_t[..., None, None] * k_t[..., None] * missing[..., None, :]
        rows.append((q_t[..., None] * h).sum(-2))
    return torch.stack(rows).to(v.dtype), h


def s4d(
    x: Float[Tensor, "s b c"],
    a: Complex[Tensor, "c N"],
    c: Complex[Tensor, "c N"],
    dt: Float[Tensor, " c"],
    skip: Float[Tensor, " c"],
    *,
    begins: Bool[Tensor, "s b"] | None = None,
    initial_state: Complex[Tensor, "b c N"] | None = None,
) -> tuple[Float[Tensor, "s b c"], Complex[Tensor, "b c N"]]:
    """h = exp(dt A) h + x; y = 2 Re(sum C (exp(dt A) - 1) / A h) + skip x."""
    h = a.new_zeros(x.shape[1], *a.shape) if initial_state is None else initial_state
    step = (a * dt[:, None]).exp()
    rows = []
    for t in range(x.shape[0]):
        x_t = at_least_fp32(x[t])
        h = _forgotten(h, begins, t) * step + x_t[..., None]
        rows.append(2 * (c * (step - 1) / a * h).sum(-1).real + skip * x_t)
    return torch.stack(rows).to(x.dtype), h
