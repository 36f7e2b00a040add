"""Every kernel once more in plain PyTorch: what the fast ones are held to, outputs and gradients.

Each is written to be read against the formula, in steps that a reader checks one by one; it holds whatever
is convenient, also all the logits. Sums are made in at least fp32, results come back in the dtype of `x`.

Letters: s seq_len, b micro batch, t = s*b tokens, h hidden_size, n num_heads, k num_kv_heads, d head_dim,
e num_experts, v vocab_size, c positions in the cache.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from meshwright.kernels.attention.seen import CAUSAL, Seen
from meshwright.kernels.matmul.cross_entropy import NOT_COUNTED
from meshwright.kernels.precision import at_least_fp32


def linear(
    x: Float[Tensor, "*tokens i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*tokens o"]:
    """Return x W^T + bias."""
    y = at_least_fp32(x) @ at_least_fp32(weight).T
    return (y if bias is None else y + at_least_fp32(bias)).to(x.dtype)


def rms_norm(x: Float[Tensor, "*tokens h"], weight: Float[Tensor, " h"], eps: float) -> Float[Tensor, "*tokens h"]:
    """Divide each vector by its root mean square, then scale each feature."""
    wide = at_least_fp32(x)
    mean_square = wide.square().mean(-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps) * weight).to(x.dtype)


def apply_rope(
    x: Float[Tensor, "s b n d"], cos: Float[Tensor, "s d_half"], sin: Float[Tensor, "s d_half"]
) -> Float[Tensor, "s b n d"]:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: the half-split ("rotate_half") layout."""
    first, second = at_least_fp32(x).chunk(2, dim=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attention(
    q: Float[Tensor, "s b n d"],
    k: Float[Tensor, "s b k d"],
    v: Float[Tensor, "s b k e"],
    seen: Seen = CAUSAL,
    *,
    document: Int[Tensor, "s b"] | None = None,
) -> Float[Tensor, "s b n e"]:
    """Average the values by the softmax of the scores; a token sees its own document only, when one is given."""
    position = torch.arange(q.shape[0], device=q.device)
    visible = seen.mask(position, position)[None, None]
    if document is not None:
        visible = visible & (document.T[:, None, :, None] == document.T[:, None, None, :])
    scores = _scores(q, k, seen.scale)
    if seen.bias is not None:
        distance = position[:, None] - position[None] - seen.first_distance()
        scores = scores + seen.bias[:, distance.clamp(0, seen.bias.shape[1] - 1)]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    if seen.drop is not None:
        at, n = range(q.shape[0]), range(q.shape[2])
        weights = weights * torch.stack([seen.drop.factors(b, n, at, at, weights) for b in range(q.shape[1])])
    return (weights @ _repeated(q, v)).permute(2, 0, 1, 3).to(q.dtype)


def cached_attention(
    q: Float[Tensor, "s b n d"], k: Float[Tensor, "c b k d"], v: Float[Tensor, "c b k d"]
) -> Float[Tensor, "s b n d"]:
    """Attend causally where the s queries are the last s of c positions."""
    s, c = q.shape[0], k.shape[0]
    seen = torch.ones(s, c, dtype=torch.bool, device=q.device).tril(diagonal=c - s)
    return _softmax_average(q, k, v, seen)


def partial_attention(
    q: Float[Tensor, "s b n d"],
    k: Float[Tensor, "c b k d"],
    v: Float[Tensor, "c b k d"],
    seen: Bool[Tensor, "#b s c"],
    scale: float | None = None,
) -> tuple[Float[Tensor, "s b n d"], Float[Tensor, "s b n"]]:
    """Return the average over the keys that are seen and the log-sum-exp; 0 and -inf for a row that sees none."""
    scores, v_ = _scores(q, k, scale).masked_fill(~seen[:, None], -torch.inf), _repeated(q, v)
    lse = scores.logsumexp(-1)
    out: Tensor = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp() @ v_
    return out.permute(2, 0, 1, 3).to(q.dtype), lse.permute(2, 0, 1)


def partial_attention_gradients(
    grad: Float[Tensor, "s b n d"],
    q: Float[Tensor, "s b n d"],
    k: Float[Tensor, "c b k d"],
    v: Float[Tensor, "c b k d"],
    results: tuple[Tensor, Tensor],
    seen: Bool[Tensor, "#b s c"],
    scale: float | None = None,
) -> tuple[Float[Tensor, "s b n d"], Float[Tensor, "c b k d"], Float[Tensor, "c b k d"]]:
    """Return dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dQ = dS K, dK = dS^T Q; out, lse are those of all keys."""
    (out, lse), scale = results, q.shape[-1] ** -0.5 if scale is None else scale
    g, q_, o = (at_least_fp32(x).permute(1, 2, 0, 3) for x in (grad, q, out))  # [b, n, s, d]
    k_, v_ = _repeated(q, k), _repeated(q, v)
    p = (_scores(q, k, scale).masked_fill(~seen[:, None], -torch.inf) - lse.permute(1, 2, 0)[..., None]).exp()
    d = p * (g @ v_.transpose(-1, -2) - (g * o).sum(-1, keepdim=True)) * scale
    heads_per_kv = q.shape[2] // k.shape[2]
    of_k, of_v = (
        torch.unflatten(x, 1, (-1, heads_per_kv)).sum(2) for x in (d.transpose(-1, -2) @ q_, p.transpose(-1, -2) @ g)
    )
    of_q, of_k, of_v = (x.permute(2, 0, 1, 3).to(q.dtype) for x in (d @ k_, of_k, of_v))
    return of_q, of_k, of_v


def _softmax_average(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    weights = _scores(q, k).masked_fill(~seen, -torch.inf).softmax(-1)
    averaged: Tensor = weights @ _repeated(q, v)
    return averaged.permute(2, 0, 1, 3).to(q.dtype)


def _scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Return scale q k, [b, n, s, c]; the scale is 1 / sqrt(d) by default."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores: Tensor = at_least_fp32(q).permute(1, 2, 0, 3) @ _repeated(q, k).transpose(-1, -2) * scale
    return scores


def _repeated(q: Tensor, k: Tensor) -> Tensor:
    """Return keys or values once for each head of q: [c, b, k, d] -> [b, n, c, d]."""
    return at_least_fp32(k).permute(1, 2, 0, 3).repeat_interleave(q.shape[2] // k.shape[2], dim=1)


# Written out, because torch's own functions are what the kernels are made of.
_POINTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x * 0.5**0.5)),
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + (-x).exp()),
    "relu2": lambda x: torch.where(x > 0, x * x, torch.zeros_like(x)),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}
_GATES = {"swiglu": "silu", "geglu": "gelu_tanh", "geglu_erf": "gelu", "reglu": "relu", "glu": "sigmoid"}


def gated_unit(
    gate: Float[Tensor, "*tokens f"], up: Float[Tensor, "*tokens f"], name: str
) -> Float[Tensor, "*tokens f"]:
    """Return f(gate) * up."""
    return (_POINTS[_GATES[name]](at_least_fp32(gate)) * at_least_fp32(up)).to(gate.dtype)


def plain_unit(x: Float[Tensor, "*tokens f"], name: str) -> Float[Tensor, "*tokens f"]:
    """Return f(x)."""
    return _POINTS[name](at_least_fp32(x)).to(x.dtype)


def grouped_linear(
    x: Float[Tensor, "t i"], weight: Float[Tensor, "e o i"], counts: Int[Tensor, " e"]
) -> Float[Tensor, "t o"]:
    """Multiply each expert's rows with its own weight; rows are sorted by expert, counts[e] of them each."""
    parts = torch.split(x, counts.tolist())
    return torch.cat([linear(part, w) for part, w in zip(parts, weight.unbind(), strict=True)])


def linear_cross_entropy(
    x: Float[Tensor, "t h"], weight: Float[Tensor, "v h"], targets: Int[Tensor, " t"], *, divisor: float
) -> Float[Tensor, ""]:
    """Return the sum of the counted tokens' cross entropy, over `divisor`; targets of -100 are not counted."""
    logits = at_least_fp32(x) @ at_least_fp32(weight).T
    counted = targets != NOT_COUNTED
    of_target = logits.gather(1, torch.where(counted, targets, 0)[:, None])[:, 0]
    loss = torch.where(counted, logits.logsumexp(-1) - of_target, 0).sum()
    return loss / divisor
