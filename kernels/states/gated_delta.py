"""The gated delta rule in chunks (Yang et al. 2024, "Gated Delta Networks", section 3.3).

    h[t] = exp(g[t]) (I - beta k k^T) h[t-1] + beta k v^T         y[t] = q[t]^T h[t]             h [d, e] for each head

Each token takes out of the decayed state what it holds for its key, and writes its own value. Within a chunk of l
tokens, with p the sum of g up to each token, what the tokens write, w, follows from a triangular system (the WY form):

    w_i = beta_i (v_i - k_i^T (exp(p_i) h + sum_{j<i} exp(p_i - p_j) k_j w_j^T))
    (I + tril(diag(beta) K K^T exp(p_i - p_j), -1)) W = diag(beta) V - diag(beta exp(p)) K h
    y = exp(p) Q h + (Q K^T exp(p_i - p_j)) W                     h' = exp(p_l) h + (exp(p_l - p) K)^T W

What a chunk does to a state is linear: h' = T h + h'_0, with T [d, d] the state that comes of h = I and values of zero.
Letters: s seq_len, b micro batch, n heads, d of a key, e of a value.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meshwright.kernels.precision import at_least_fp32
from meshwright.kernels.states.chunks import Sight, sight
from meshwright.kernels.states.recomputed import chunk_by_chunk


def gated_delta(
    q: Float[Tensor, "s b n d"],
    k: Float[Tensor, "s b n d"],
    v: Float[Tensor, "s b n e"],
    beta: Float[Tensor, "s b n"],
    g: Float[Tensor, "s b n"],
    *,
    begins: Bool[Tensor, "s b"] | None = None,
    initial_state: Float[Tensor, "b n d e"] | None = None,
    chunk_size: int,
) -> tuple[Float[Tensor, "s b n e"], Float[Tensor, "b n d e"]]:
    """Return y, in v's type, and the state after the last token, in at least fp32.

    q and k come as they meet (normalised, q scaled); g is not positive. `begins` says at which tokens the state is zero
    before they come.
    """
    (_, batch, n, d), e = k.shape, v.shape[3]
    state = at_least_fp32(v[:0]).new_zeros(batch, n, d, e) if initial_state is None else at_least_fp32(initial_state)
    if not len(v):
        return torch.empty_like(v), state
    y, last = chunk_by_chunk(_through_chunk, state, (q, k, v, beta, g), (), begins, chunk_size)
    return y, last


def gated_delta_summary(
    k: Float[Tensor, "s b n d"],
    v: Float[Tensor, "s b n e"],
    beta: Float[Tensor, "s b n"],
    g: Float[Tensor, "s b n"],
    *,
    begins: Bool[Tensor, "s b"] | None = None,
    chunk_size: int,
) -> tuple[Float[Tensor, "b n d d"], Float[Tensor, "b n d e"]]:
    """Return what a stretch of tokens does to a state before it: h' = T h + state.

    Both in one pass, of values [v, 0] into a state [0, I]; past a document's start nothing is left of I.
    """
    (_, batch, n, d), e = k.shape, v.shape[3]
    one = torch.eye(d, dtype=at_least_fp32(v[:0]).dtype, device=v.device).expand(batch, n, d, d)
    first = torch.cat([one.new_zeros(batch, n, d, e), one], -1)
    values = torch.cat([v, v.new_zeros(*v.shape[:3], d)], -1)
    q = torch.zeros_like(k)  # what is read does not matter
    _, state = gated_delta(q, k, values, beta, g, begins=begins, initial_state=first, chunk_size=chunk_size)
    return state[..., e:], state[..., :e]


def _through_chunk(
    h: Tensor, inputs: list[Tensor], shared: list[Tensor], begins: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y [l, b, n, e] of a chunk and the state after it."""
    q, k, v = (at_least_fp32(each).permute(1, 2, 0, 3) for each in inputs[:3])  # [b, n, l, ...]
    beta, g = (at_least_fp32(each).permute(1, 2, 0)[..., None] for each in inputs[3:])
    cut = _sight_of(begins, q)
    seen = cut.seen[:, None]
    p = seen @ g  # [b, n, l, 1]
    decays = (p - p.mT).clamp(max=0).exp() * seen
    into = p.exp() * cut.from_before[:, None, :, None]
    out_of = (p[..., -1:, :] - p).clamp(max=0).exp() * cut.reaches_end[:, None, :, None]
    across = p[..., -1:, :].exp() * cut.untouched[:, None, None, None]
    k_beta = k * beta
    system = (k_beta @ k.mT) * decays
    right = torch.cat([v * beta, k_beta * into], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written = solved[..., : v.shape[-1]] - solved[..., v.shape[-1] :] @ h
    y = (q * into) @ h + ((q @ k.mT) * decays) @ written
    after = h * across + (k * out_of).mT @ written
    return y.permute(2, 0, 1, 3).to(inputs[2].dtype), after


def _sight_of(begins: Tensor | None, q: Tensor) -> Sight:
    """Return what the tokens of a chunk [b, n, l, d] see."""
    if begins is None:
        begins = torch.zeros(q.shape[2], 1, dtype=torch.bool, device=q.device)
    return sight(begins, q.dtype)
