"""Norms of queries, keys and values: of each head's features, or of all heads' together.

    of heads    x [s, b, n, d]    each d features by themselves; every rank's heads alike, whatever tp
    of tokens   x [s, b, n, d]    the n*d features of a token (OLMo2): x / sqrt(mean(x^2) + eps) * weight [n*d]

A rank of tp has n/tp of the heads, so the mean square of a token is a sum over its ranks. Key heads that lie on several
ranks as copies are counted once: the sum over all ranks is divided by the copies.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.precision import at_least_fp32
from meshwright.model.norms import RMSNorm
from meshwright.parallel.collectives import sum_over_ranks
from meshwright.parallel.fits import check_finite, check_known
from meshwright.parallel.initialise import ONES, InitRule
from meshwright.parallel.mesh import NO_TP, Axis
from meshwright.parallel.placement import Placement, Split, partial_over
from meshwright.parallel.tensor.linear import NO_COPIES, divide

MakeNorm = Callable[[int, Axis], nn.Module]
"""Makes the norm of rows of a size, of which each rank of an axis sees others."""


class HeadNorms(NamedTuple):
    """Which of q, k and v are normalised, and how."""

    of: frozenset[str] = frozenset()
    make: MakeNorm | None = None
    """Of heads: what makes a norm of head_dim features."""
    over: Literal["heads", "tokens"] = "heads"
    eps: float = 1e-6
    """Of tokens: RMSNorm's."""

    def check(self) -> None:
        """Hold the names to those that there are, and norms of heads to having what makes them.

        Raises:
            ValueError: naming the others, or what is missing.
        """
        check_known("norms", self.of, ("q", "k", "v"))
        check_known("over", [self.over], ("heads", "tokens"))
        if self.of and self.over == "heads" and self.make is None:
            raise ValueError("make = None: must be what makes a norm of (head_dim, tp); rms_norms(1e-6) would fit")

    def made(self, of: str, num_heads: int, head_dim: int, tp: Axis, copies: Axis = NO_COPIES) -> nn.Module | None:
        """Return the norm of q, k or v, None if it has none."""
        if of not in self.of:
            return None
        if self.over == "tokens":
            return TokenRMSNorm(num_heads, head_dim, self.eps, tp=tp, copies=copies)
        assert self.make is not None, "`check` sees to it"
        return self.make(head_dim, tp)


NO_NORMS = HeadNorms()


def rms_norms(eps: float, of: str = "qk", *, over: Literal["heads", "tokens"] = "heads") -> HeadNorms:
    """Return RMSNorms of queries and keys ("qk"; "qkv": of values too)."""
    return HeadNorms(frozenset(of), partial(_rms_norm, eps), over, eps)


def _rms_norm(eps: float, size: int, tp: Axis) -> nn.Module:
    return RMSNorm(size, eps, tp=tp)


class TokenRMSNorm(nn.Module):
    """RMSNorm of all heads' features of a token, of which this rank has some."""

    def __init__(
        self, num_heads: int, head_dim: int, eps: float, *, tp: Axis = NO_TP, copies: Axis = NO_COPIES
    ) -> None:
        """Take global sizes; hold the weights of this rank's heads.

        Raises:
            ValueError: if no row could be divided with this `eps`.
        """
        super().__init__()
        check_finite({"eps": eps}, usual=1e-6, least=0.0)
        self.eps, self.tp, self.copies, self.size = eps, tp, copies, num_heads * head_dim
        self.split = Split(0, tp, copies=copies.size)
        self.weight = nn.Parameter(torch.empty(divide(self.size, self.split.parts, what="heads", by=tp.name)))

    def placements(self) -> dict[str, Placement]:
        """Say that the weight is cut with the heads; of copies each has a part of the gradient."""
        return {"weight": Placement((self.split,), grad_sum=partial_over(self.copies))}

    def init_rules(self) -> dict[str, InitRule]:
        """Say how the weight begins."""
        return {"weight": ONES}

    def forward(self, x: Float[Tensor, "s b n d"]) -> Float[Tensor, "s b n d"]:
        """Normalise each token over all ranks' heads; the result has x's type."""
        wide = at_least_fp32(x)
        squares = sum_over_ranks(wide.square().sum((2, 3), keepdim=True), self.tp) / self.copies.size
        weight = self.weight.view(x.shape[2:]).to(wide.dtype)
        return (wide * torch.rsqrt(squares / self.size + self.eps) * weight).to(x.dtype)
