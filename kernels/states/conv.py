"""A causal convolution of each channel by itself, as shifted multiply-adds: no transposes, nothing kept but x.

    y[t] = act(bias + sum_j weight[:, k - 1 - j] x[t - j])       j = 0 ... k - 1, the taps

The k - 1 tokens before the first are the `halo`: zeros at the beginning of a sample, the last tokens seen where a
sequence goes on (the next step of a generation, a chunk whose beginning lies on another rank). A token does not see
past the start of its document: its taps that reach before it are zeros, as at the beginning of a sample.

    x      a b c | D E F        | a document starts at D
    tap 0  a b c   D E F
    tap 1  . a b   . D E
    tap 2  . . a   . . D

Kept for the backward are x and the halo; what went into the activation is computed again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from meshwright.kernels.applied import applied
from meshwright.kernels.precision import at_least_fp32
from meshwright.kernels.states.chunks import segments


@torch.compiler.disable  # type: ignore[untyped-decorator]
def causal_conv(
    x: Float[Tensor, "s b c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, " c"] | None = None,
    *,
    halo: Float[Tensor, "k_less_one b c"] | None = None,
    begins: Bool[Tensor, "s b"] | None = None,
    silu: bool = True,
) -> Float[Tensor, "s b c"]:
    """Convolve each channel with its own k weights, the last for the token itself; sums in at least fp32.

    `begins` says where documents start. Tokens of the halo that belong to an earlier document than its last one are to
    be zeros. The result has x's type.

    Raises:
        ValueError: if the halo has not k - 1 tokens.
    """
    before = weight.shape[1] - 1
    if halo is not None and halo.shape[0] != before:
        raise ValueError(f"a halo of {halo.shape[0]} tokens; a convolution of {before + 1} taps needs {before}")
    seen = None if begins is None else _seen(begins, before)
    return applied(_CausalConv, x, weight, bias, halo, seen, silu)


def next_conv(
    x: Float[Tensor, "1 b c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, " c"] | None,
    halo: Float[Tensor, "k_less_one b c"],
) -> tuple[Float[Tensor, "1 b c"], Float[Tensor, "k_less_one b c"]]:
    """Return silu(conv) of one token more, and the halo of the token after it: `causal_conv` without a gradient."""
    window = torch.cat([halo.to(x.dtype), x])
    y = (at_least_fp32(window) * at_least_fp32(weight).t()[:, None]).sum(0, keepdim=True)
    if bias is not None:
        y += bias
    return F.silu(y, inplace=True).to(x.dtype), window[1:].clone()


def tail(x: Float[Tensor, "s b c"], halo: Float[Tensor, "h b c"]) -> Float[Tensor, "h b c"]:
    """Return the halo of the tokens that follow x, whose own halo is given; it holds nothing of the tokens before."""
    s = x.shape[0]
    return torch.cat([halo[s:].to(x.dtype), x[max(0, s - halo.shape[0]) :]])


def _seen(begins: Tensor, before: int) -> Tensor:
    """Return for each tap j > 0 whether token t sees token t - j, [k - 1, s, b, 1]; of the halo it sees the last."""
    segment = F.pad(segments(begins), (0, 0, before, 0))
    s = begins.shape[0]
    taps = [segment[before:] == segment[before - j : before - j + s] for j in range(1, before + 1)]
    return torch.stack(taps)[..., None] if taps else begins.new_empty(0, s, 1, 1)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, seen: Tensor | None, silu: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, halo, seen)
        ctx.silu = silu
        y = _convolved(x, weight, bias, halo, seen)
        return (F.silu(y, inplace=True) if silu else y).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, halo, seen = ctx.saved_tensors
        s, before = x.shape[0], weight.shape[1] - 1
        wide, taps = at_least_fp32(x), at_least_fp32(weight).t().contiguous()
        grad = at_least_fp32(grads[0])
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, _convolved(x, weight, bias, halo, seen))
        of_taps, of_x = torch.empty_like(taps), grad * taps[before]
        of_taps[before] = _summed(grad, wide)
        of_halo = None if halo is None else torch.zeros_like(at_least_fp32(halo))
        for j in range(1, before + 1):
            above = grad if seen is None else grad * seen[j - 1]
            inside = max(s - j, 0)
            of_x[:inside].addcmul_(above[j:], taps[before - j])
            of_taps[before - j] = _summed(above[j:], wide[:inside])
            if halo is not None and of_halo is not None:
                reached = slice(before - j, before - j + min(j, s))
                of_halo[reached].addcmul_(above[:j], taps[before - j])
                of_taps[before - j] += _summed(above[:j], at_least_fp32(halo[reached]))
        of_bias = None if bias is None else grad.sum((0, 1)).to(bias.dtype)
        of_halo = None if halo is None or of_halo is None else of_halo.to(halo.dtype)
        return of_x.to(x.dtype), of_taps.t().to(weight.dtype), of_bias, of_halo, None, None


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor | None, seen: Tensor | None) -> Tensor:
    """Return what goes into the activation, in at least fp32."""
    wide, taps = at_least_fp32(x), at_least_fp32(weight).t().contiguous()
    s, before = x.shape[0], weight.shape[1] - 1
    y = wide * taps[before]
    if bias is not None:
        y += bias.to(y.dtype)
    for j in range(1, before + 1):
        inside = max(s - j, 0)
        earlier = wide[:inside] if seen is None else wide[:inside] * seen[j - 1, j:]
        y[j:].addcmul_(earlier, taps[before - j])
        if halo is not None:
            outside = at_least_fp32(halo[before - j : before - j + min(j, s)])
            outside = outside if seen is None else outside * seen[j - 1, :j]
            y[:j].addcmul_(outside, taps[before - j])
    return y


def _summed(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a * b over all tokens."""
    return (a * b).sum((0, 1))
