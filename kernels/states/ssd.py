"""The state-space scan of Mamba-2 in chunks (Dao and Gu 2024, "Transformers are SSMs", section 6).

    h[t] = exp(dt[t] a) h[t-1] + dt[t] x[t] B[t]^T      y[t] = h[t] C[t] + skip x[t]         h [d, N] for each head

n heads in g groups; the r = n/g heads of a group share B and C. Within a chunk of l tokens, with u = dt x, the
running sum p of dt a, and the state h before the chunk laid out as [N, r d] for each group:

    S = C B^T              [l, l]      scores, of a group          0 where i does not see j
    M = S exp(p_i - p_j)   [l, l]      weights, of a head
    y = M u + exp(p_i) (C h)           C h, and below B^T (...), are products for all heads of a group at once
    h' = exp(p_l) h + B^T (exp(p_l - p_j) u)

    backward, from dy and dh':   dM = dy u^T,   dS = sum over heads of dM exp(p_i - p_j),    E = exp(p_i) dy
    dC = dS B + E h^T            dB = dS^T C + (exp(p_l - p_j) u) dh'^T       dh = exp(p_l) dh' + C^T E
    du = M^T dy + exp(p_l - p_j) (B dh')
    dp_i = sum_j (dM M)_ij - sum_j (dM M)_ji + dy_i exp(p_i) (C h)_i - u_i exp(p_l - p_i) (B dh')_i;  dp_l += h' dh'

Kept for the backward are the inputs and the state before each chunk; the chunks' own products are made again. Work goes
chunk by chunk on a CPU, where rows are multiplied where they lie and what a chunk needs stays in its cache, and by
several chunks at once on a GPU. A document's start cuts S, exp(p_i), exp(p_l - p_j) and exp(p_l) (chunks.py).
Letters: s seq_len, b micro batch, n heads, d head_dim, g groups, r heads of a group, N state_size.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from meshwright.kernels.precision import at_least_fp32, without_autocast
from meshwright.kernels.states.chunks import Stretch, sight, stretches

CHUNKS_AT_ONCE_ON_GPU = 16


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
    chunk_size: int,
) -> tuple[Float[Tensor, "s b n d"], Float[Tensor, "b n d N"]]:
    """Return y, in x's type, and the state after the last token, in at least fp32.

    dt is positive and a negative; `begins` says at which tokens the state is zero before they come.

    Raises:
        ValueError: if the groups do not divide the heads.
    """
    if x.shape[2] % b.shape[2] != 0:
        raise ValueError(f"num_heads = {x.shape[2]} does not divide by num_groups = {b.shape[2]}")
    at_once = 1 if x.device.type == "cpu" else CHUNKS_AT_ONCE_ON_GPU
    y, states = chunked_ssd(x, dt, a, b, c, skip, begins, initial_state, chunk_size, at_once)
    return y, _state_out(states[-1], x, b)


def ssd_summary(
    x: Float[Tensor, "s b n d"],
    dt: Float[Tensor, "s b n"],
    a: Float[Tensor, " n"],
    b: Float[Tensor, "s b g N"],
    *,
    begins: Bool[Tensor, "s b"] | None = None,
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n d N"]]:
    """Return what a stretch of tokens does to a state before it: h' = decay h + state.

    One product over all the tokens, with decays summed from the end, where they matter.
    """
    with without_autocast(x):
        x, dt, a, b = (at_least_fp32(each) for each in (x, dt, a, b))
        rate = dt * a
        later = rate.flip(0).cumsum(0).flip(0) - rate  # after each token
        weight, decay = later.exp() * dt, rate.sum(0).exp()
        if begins is not None:
            seen = sight_of_end(begins)
            weight, decay = weight * seen[..., None], decay * ~begins.any(0)[:, None]
        s, batch, n, d = x.shape
        u = (x * weight[..., None]).view(s, batch, b.shape[2], -1).permute(1, 2, 3, 0)  # [b, g, r d, s]
        state = u @ b.permute(1, 2, 0, 3)
    return decay, state.reshape(batch, n, d, -1)


def sight_of_end(begins: Bool[Tensor, "s b"]) -> Bool[Tensor, "s b"]:
    """Say for each token whether no document starts after it."""
    return begins.flip(0).cumsum(0).flip(0) - begins.int() == 0


class _Chunks(NamedTuple):
    """The inputs of some chunks, in at least fp32, by z = chunks * b * g."""

    x: Tensor  # [z, l, r, d]
    dt: Tensor  # [z, l, r]
    u: Tensor  # [z, l, r, d]
    b: Tensor  # [z, l, N]
    c: Tensor  # [z, l, N]
    p: Tensor  # [z, r, l]
    scores: Tensor  # [z, l, l]
    into: Tensor  # exp(p_i), [z, l, r, 1]
    out_of: Tensor  # exp(p_l - p_j), [z, l, r, 1]
    across: Tensor  # exp(p_l), [z, 1, r, 1]
    seen: Tensor  # [z, l, l], or [l, l]

    def decays(self) -> Tensor:
        """Return exp(p_i - p_j) for each head, [z, r, l, l]; above the diagonal 1, which is not used."""
        return torch.sub(self.p[..., :, None], self.p[..., None, :]).clamp_(max=0).exp_()

    def heads(self, rows: Tensor) -> Tensor:
        """Return [z, l, r, d] as [z * r, l, d] where it lies, if there is but one chunk."""
        z, length, r, d = rows.shape
        return rows.permute(0, 2, 1, 3).reshape(z * r, length, d)


def _grouped(x: Tensor, work: Stretch, groups: int) -> Tensor:
    """Return the rows [s, b, g, ...] or [s, b, n, ...] of some chunks as [chunks * b * g, l, ...], in at least fp32."""
    rows = at_least_fp32(x[work.tokens])
    rows = rows.view(work.chunks, work.length, rows.shape[1], groups, -1, *rows.shape[3:])
    return rows.movedim(1, 3).flatten(0, 2)


def _ungrouped(rows: Tensor, work: Stretch, out: Tensor) -> None:
    """Write [chunks * b * g, l, ...] to the rows of some chunks of out [s, b, ...]."""
    target = out[work.tokens].view(work.chunks, work.length, out.shape[1], -1, *rows.shape[2:])
    target.copy_(rows.view(work.chunks, out.shape[1], -1, *rows.shape[1:]).movedim(3, 1))


def _chunks_of(inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], begins: Tensor | None, work: Stretch) -> _Chunks:
    x, dt, a, b, c = inputs
    groups = b.shape[2]
    x, dt = _grouped(x, work, groups), _grouped(dt, work, groups)
    b, c = _grouped(b, work, groups).squeeze(2), _grouped(c, work, groups).squeeze(2)
    rate = dt * a.view(groups, 1, -1).repeat(dt.shape[0] // groups, 1, 1)
    cut = None
    seen = torch.ones(work.length, work.length, dtype=x.dtype, device=x.device).tril()
    if begins is not None:
        rows = begins[work.tokens].view(work.chunks, work.length, -1).movedim(1, 0)
        cut = sight(rows.flatten(1).repeat_interleave(groups, 1), x.dtype)  # [z, ...]
        seen = cut.seen
    # Sums over what is seen, and not running sums: so no bit of an earlier document is left in them.
    p = torch.matmul(seen, rate).transpose(1, 2).contiguous()  # [z, r, l]
    into = p.exp().transpose(1, 2)[..., None]
    out_of = (p[..., -1:] - p).clamp_(max=0).exp_().transpose(1, 2)[..., None]
    across = p[..., -1].exp()[:, None, :, None]
    if cut is not None:
        into, out_of = into * cut.from_before[..., None, None], out_of * cut.reaches_end[..., None, None]
        across = across * cut.untouched[:, None, None, None]
    scores = torch.bmm(c, b.transpose(1, 2)).mul_(seen)
    return _Chunks(x, dt, x * dt[..., None], b, c, p, scores, into, out_of, across, seen)


@torch.library.custom_op("meshwright::chunked_ssd", mutates_args=())
def chunked_ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    begins: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
    at_once: int,
) -> tuple[Tensor, Tensor]:
    """Compute y and the states before each chunk and after the last, [chunks + 1, b * g, N, r * d]."""
    inputs, work = (x, dt, at_least_fp32(a), b, c), stretches(x.shape[0], chunk_size, at_once)
    y, states = _empty_results(x, b, chunk_size)
    states[0] = _state_in(x, b, initial_state)
    at = 0
    with without_autocast(x):
        for stretch in work:
            chunk = _chunks_of(inputs, begins, stretch)
            passed = states[at : at + stretch.chunks + 1]
            _through(chunk, passed)
            _ungrouped(_output(chunk, passed[:-1].flatten(0, 1), skip), stretch, y)
            at += stretch.chunks
    return y, states


@torch.library.custom_op("meshwright::chunked_ssd_gradients", mutates_args=())
def chunked_ssd_gradients(
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
    at_once: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, dt, a, b, c, skip and the first state, from those of y and of the last state."""
    inputs, work = (x, dt, at_least_fp32(a), b, c), stretches(x.shape[0], chunk_size, at_once)
    grad, dh, at = _Gradients(x, dt, a, b, c, skip), of_last, states.shape[0] - 1
    with without_autocast(x):
        for stretch in reversed(work):
            chunk = _chunks_of(inputs, begins, stretch)
            passed = states[at - stretch.chunks : at + 1]
            dh = _back(chunk, passed, (_grouped(dy, stretch, b.shape[2]), dh), grad, stretch)
            at -= stretch.chunks
    dh = dh.clone() if dh is of_last else dh
    return grad.x, grad.dt, grad.a.sum(0).flatten(), grad.b, grad.c, grad.skip.sum(0).flatten(), dh


def _empty_results(x: Tensor, b: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    batch, groups, size = b.shape[1:]
    chunks = -(-x.shape[0] // chunk_size)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (chunks + 1, batch * groups, size, x.shape[2] // groups * x.shape[3])
    return x.new_empty(x.shape), x.new_empty(shape, dtype=wide)


@chunked_ssd.register_fake
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
    at_once: int,
) -> tuple[Tensor, Tensor]:
    return _empty_results(x, b, chunk_size)


@chunked_ssd_gradients.register_fake
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
    at_once: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (each.new_empty(each.shape) for each in (x, dt))
    of_a, of_skip = (states.new_empty(a.shape) for _ in range(2))
    of_x, of_dt = inputs
    return of_x, of_dt, of_a, b.new_empty(b.shape), c.new_empty(c.shape), of_skip, states.new_empty(states.shape[1:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.chunk_size, ctx.at_once = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, of_states: Tensor | None) -> tuple[Tensor | None, ...]:
    x, dt, a, b, c, skip, begins, initial_state, states = ctx.saved_tensors
    given = (x, dt, a, b, c, skip, begins, states, ctx.chunk_size, ctx.at_once)
    dy = torch.zeros_like(x) if dy is None else dy
    of_last = torch.zeros_like(states[0]) if of_states is None else of_states[-1]  # of the states only the last is out
    of_x, of_dt, of_a, of_b, of_c, of_skip, dh = chunked_ssd_gradients(dy, of_last, *given)
    of_skip = None if skip is None else of_skip.to(skip.dtype)
    of_state = None if initial_state is None else _state_out(dh, x, b).to(initial_state.dtype)
    return of_x, of_dt, of_a.to(a.dtype), of_b, of_c, of_skip, None, of_state, None, None


chunked_ssd.register_autograd(_backward, setup_context=_save)


def _state_in(x: Tensor, b: Tensor, state: Tensor | None) -> Tensor:
    """Return a state [b, n, d, N] as the products take it, [b * g, N, r * d]; zeros without one."""
    batch, groups, size, width = x.shape[1], b.shape[2], b.shape[3], x.shape[2] // b.shape[2] * x.shape[3]
    if state is None:
        wide = at_least_fp32(x[:0])
        return wide.new_zeros(batch * groups, size, width)
    return at_least_fp32(state).reshape(batch * groups, width, size).transpose(1, 2).contiguous()


def _state_out(h: Tensor, x: Tensor, b: Tensor) -> Tensor:
    return h.transpose(1, 2).reshape(x.shape[1], x.shape[2], x.shape[3], b.shape[3])


def _through(chunk: _Chunks, states: Tensor) -> None:
    """Fill in the states after each of some chunks, [chunks + 1, b * g, N, r * d], from that before the first."""
    rows = states.shape[1]
    added = torch.bmm(chunk.b.transpose(1, 2), (chunk.u * chunk.out_of).flatten(2))
    for at, (across, more) in enumerate(zip(torch.split(chunk.across, rows), torch.split(added, rows), strict=True)):
        before, after = (torch.unflatten(each, 2, (across.shape[2], -1)) for each in (states[at], states[at + 1]))
        torch.addcmul(torch.unflatten(more, 2, (across.shape[2], -1)), before, across, out=after)


def _output(chunk: _Chunks, states: Tensor, skip: Tensor | None) -> Tensor:
    z, length, r, d = chunk.x.shape
    weights = chunk.decays().mul_(chunk.scores[:, None]).flatten(0, 1)
    y = torch.bmm(chunk.c, states).view(z, length, r, d).mul_(chunk.into)
    inside = torch.bmm(weights, chunk.heads(chunk.u)).view(z, r, length, d)
    y += inside.transpose(1, 2)
    return y if skip is None else y.addcmul_(chunk.x, _by_group(skip, z, r))


def _by_group(skip: Tensor, z: int, r: int) -> Tensor:
    """Return one number for each head as [z, 1, r, 1]."""
    groups = skip.shape[0] // r
    return at_least_fp32(skip).view(groups, 1, r, 1).repeat(z // groups, 1, 1, 1)


class _Gradients:
    """What the backward fills, chunk by chunk."""

    def __init__(self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None) -> None:
        self.x, self.dt, self.b, self.c = (
            torch.empty_like(each, memory_format=torch.contiguous_format) for each in (x, dt, b, c)
        )
        self.rate, self.given_skip = at_least_fp32(a), skip
        groups = b.shape[2]
        self.a = self.rate.new_zeros(x.shape[1], groups, x.shape[2] // groups)
        self.skip = torch.zeros_like(self.a)


def _back(chunk: _Chunks, states: Tensor, above: tuple[Tensor, Tensor], grad: _Gradients, work: Stretch) -> Tensor:
    """Go back through some chunks, from the gradients of their outputs and of the state after the last.

    `states` are those before each chunk and after the last. Returns the gradient of the state before the first.
    """
    before, after, (dy, dh) = states[:-1].flatten(0, 1), states[1:].flatten(0, 1), above
    z, length, r, d = chunk.x.shape
    rows = dh.shape[0]
    e = (dy * chunk.into).flatten(2)
    from_output = torch.bmm(chunk.c.transpose(1, 2), e)
    of_after = []
    across_each, more_each = torch.split(chunk.across, rows), torch.split(from_output, rows)
    for across, more in zip(reversed(across_each), reversed(more_each), strict=True):
        of_after.append(dh)
        dh = torch.addcmul(torch.unflatten(more, 2, (r, -1)), torch.unflatten(dh, 2, (r, -1)), across).flatten(2)
    of_after.reverse()
    dh_after = of_after[0] if len(of_after) == 1 else torch.cat(of_after)

    decays = chunk.decays()
    dy_heads, u_heads = chunk.heads(dy), chunk.heads(chunk.u)
    weights = decays.mul(chunk.scores[:, None]).flatten(0, 1)
    du = torch.bmm(weights.transpose(1, 2), dy_heads).view(z, r, length, d).transpose(1, 2)
    of_scores = torch.bmm(dy_heads, u_heads.transpose(1, 2)).view(z, r, length, length).mul_(decays)
    met = of_scores * chunk.scores[:, None]
    dp = met.sum(-1) - met.sum(-2)  # [z, r, l]
    ds = of_scores.sum(1).mul_(chunk.seen)
    ended = torch.bmm(chunk.b, dh_after).view(z, length, r, d).mul_(chunk.out_of)
    begun = torch.bmm(chunk.c, before).view(z, length, r, d).mul_(chunk.into)
    dp += (dy * begun).sum(-1).transpose(1, 2) - (chunk.u * ended).sum(-1).transpose(1, 2)
    dp[..., -1] += torch.unflatten(after * dh_after, 2, (r, -1)).sum((1, 3))
    du = du + ended
    of_c = torch.baddbmm(torch.bmm(e, before.transpose(1, 2)), ds, chunk.b)
    weighted = (chunk.u * chunk.out_of).flatten(2)
    of_b = torch.baddbmm(torch.bmm(weighted, dh_after.transpose(1, 2)), ds.transpose(1, 2), chunk.c)
    _ungrouped(of_b[:, :, None], work, grad.b)
    _ungrouped(of_c[:, :, None], work, grad.c)
    _inputs_back(chunk, du, dy, dp, grad, work)
    return dh


def _inputs_back(chunk: _Chunks, du: Tensor, dy: Tensor, dp: Tensor, grad: _Gradients, work: Stretch) -> None:
    """Bring the gradients of u = dt x, y and the running sums p to x, dt, a and skip."""
    z, _, r, _ = chunk.x.shape
    batch, groups = grad.a.shape[:2]
    of_rate = torch.matmul(chunk.seen.mT, dp.transpose(1, 2))  # [z, l, r], of dt a
    rate = grad.rate.view(groups, 1, r).repeat(z // groups, 1, 1)
    _ungrouped((du * chunk.x).sum(-1).addcmul_(of_rate, rate), work, grad.dt)
    grad.a += (of_rate * chunk.dt).sum(1).view(-1, batch, groups, r).sum(0)
    of_x = du * chunk.dt[..., None]
    if grad.given_skip is not None:
        of_x.addcmul_(dy, _by_group(grad.given_skip, z, r))
        grad.skip += (dy * chunk.x).sum((1, 3)).view(-1, batch, groups, r).sum(0)
    _ungrouped(of_x, work, grad.x)
