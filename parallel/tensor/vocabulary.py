"""Both ends of a language model with the vocabulary split over the tensor-parallel axis.

    Embedding    tokens [s, b]       weight [v/tp, h]   ->  [s/tp, b, h]     each rank looks its own rows up, then a sum
    next_token_loss    x [s/tp, b, h]   weight [v/tp, h]   ->  this rank's share of the loss
    next_token_logits  x [s/tp, b, h]   weight [v/tp, h]   ->  [s, b, v/tp]

The logits of a token lie on all ranks and are never gathered: of each chunk of tokens the ranks agree on the largest
logit, on the sum of the exponentials and on the target's logit, three numbers a token. A vocabulary that does not
divide is padded: the last rows of the last ranks are zeros, their logits -inf.

A rank's share of the loss is that of the tokens that it holds between layers, so shares add up over all axes alike.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from meshwright.kernels.limits import USUAL, Limits
from meshwright.kernels.matmul import products
from meshwright.kernels.matmul.cross_entropy import NOT_COUNTED, linear_cross_entropy, products_dtype
from meshwright.kernels.matmul.linear import linear
from meshwright.kernels.precision import at_least_fp32
from meshwright.parallel.collectives import (
    all_reduce,
    all_reduce_max,
    gather,
    gather_rows,
    scatter_sum,
    scatter_sum_of_rows,
)
from meshwright.parallel.initialise import InitPolicy, InitRule
from meshwright.parallel.mesh import NO_TP, Axis
from meshwright.parallel.placement import Placement, Split


class VocabularyRows(nn.Module):
    """A matrix [v, h] with a row for each token id, of which this rank holds 1/tp of the rows, perhaps padded."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, rule: InitRule, tp: Axis = NO_TP, copies: Axis | None = None
    ) -> None:
        """Take the global sizes and the rule that the weight begins with.

        `copies`: the axis along which others hold the same rows and use them otherwise, as the two ends of a pipeline
        do with a tied matrix; the gradient is the sum of all uses.
        """
        super().__init__()
        self.copies = () if copies is None else (copies,)
        self.rule, self.tp, self.vocab_size = rule, tp, vocab_size
        self.weight = nn.Parameter(torch.empty(-(-vocab_size // tp.size), hidden_size))

    def placements(self) -> dict[str, Placement]:
        """Say that the weight is cut along the vocabulary."""
        size = self.vocab_size if self.vocab_size % self.tp.size else 0
        return {"weight": Placement((Split(0, self.tp, size=size),) if self.tp.is_split else (), grad_sum=self.copies)}

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return {"weight": self.rule}

    @property
    def first(self) -> int:
        """Return the first token id that this rank has a row for."""
        return self.tp.rank * self.weight.shape[0]


class Embedding(VocabularyRows):
    """A vector for each token id."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        init: InitPolicy | None = None,
        tp: Axis = NO_TP,
        copies: Axis | None = None,
    ) -> None:
        """Take global sizes."""
        rule = (init or InitPolicy()).embedding(vocab_size, hidden_size)
        super().__init__(vocab_size, hidden_size, rule=rule, tp=tp, copies=copies)

    def forward(self, tokens: Int64[Tensor, "s b"]) -> Float[Tensor, "s_local b h"]:
        """Look the vectors up; each rank is left with those of its stretch of the tokens."""
        if not self.tp.is_split:
            return F.embedding(tokens, self.weight)
        own = tokens - self.first
        is_own = (own >= 0) & (own < self.weight.shape[0])
        vectors = F.embedding(torch.where(is_own, own, 0), self.weight)
        return scatter_sum(vectors * is_own[..., None].to(vectors.dtype), self.tp)


def next_token_loss(
    x: Float[Tensor, "s_local b h"],
    rows: VocabularyRows,
    targets: Int64[Tensor, "s b"],
    step_tokens: float,
    limits: Limits = USUAL,
) -> Float[Tensor, ""]:
    """Return this rank's share of the counted targets' cross entropy, over the counted tokens of the whole step."""
    if not rows.tp.is_split:
        tokens = x.flatten(0, 1)
        return linear_cross_entropy(tokens, rows.weight, targets.flatten(), divisor=step_tokens, limits=limits)
    # Within a Function gradients are off, and a weight says that it wants one also in an evaluation.
    wants = torch.is_grad_enabled() and (x.requires_grad or rows.weight.requires_grad)
    own = _Vocabulary(rows, x.shape[0] * x.shape[1], wants, limits.logits(x.device.type))
    loss: Tensor = _SplitCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x, rows.weight, targets.flatten(), own, step_tokens, products_dtype(x)
    )
    return loss


def next_token_logits(x: Float[Tensor, "s_local b h"], rows: VocabularyRows) -> Float[Tensor, "s b v_local"]:
    """Return a score for every token of this rank's part of the vocabulary."""
    return linear(gather(x, rows.tp), rows.weight)


class _Vocabulary:
    """Which part of the vocabulary, and of the tokens, is this rank's, and how and whether gradients are made of it."""

    def __init__(self, rows: VocabularyRows, held: int, wants_gradients: bool, logits: int) -> None:
        self.tp, self.first, self.wants_gradients = rows.tp, rows.first, wants_gradients
        self.real = min(max(rows.vocab_size - rows.first, 0), rows.weight.shape[0])
        """Rows that are no padding."""
        self.held = slice(rows.tp.rank * held, (rows.tp.rank + 1) * held)
        """Flat indices of the tokens whose loss is this rank's share."""
        self.chunk = max(1, logits // rows.weight.shape[0])
        """Tokens in a chunk, the same on all ranks."""


class _SplitCrossEntropy(torch.autograd.Function):
    """As the kernel of a whole vocabulary, with the chunks' statistics agreed over tp; gradients made on the way.

    The gathered tokens and the gradient of all of them live while the chunks are gone through, and no longer.
    """

    @staticmethod
    def forward(
        ctx: Any, held: Tensor, weight: Tensor, targets: Tensor, own: _Vocabulary, divisor: float, dtype: torch.dtype
    ) -> Tensor:
        x = gather_rows(held.flatten(0, 1).to(dtype), own.tp)
        wide = at_least_fp32(weight[:0].to(dtype)).dtype
        narrow = weight.to(dtype)
        losses = torch.zeros(x.shape[0], dtype=wide, device=x.device)
        wants = own.wants_gradients
        of_x = torch.empty_like(x, dtype=wide) if wants else losses
        of_weight = torch.zeros_like(weight, dtype=wide) if wants else losses
        for begin in range(0, x.shape[0], own.chunk):
            part = slice(begin, begin + own.chunk)
            x_part = x[part]
            losses[part], p, share = _chunk(x_part, narrow, targets[part], own, divisor)
            if wants:
                p = p.to(dtype)
                torch.mul(products.input_gradient(p, narrow), share, out=of_x[part])
                products.add_weight_gradient(p, (x_part * share).to(dtype), of_weight)
            del p  # before the next chunk's logits are there
        of_held = scatter_sum_of_rows(of_x.to(held.dtype), own.tp).view(held.shape) if wants else losses
        ctx.save_for_backward(of_held, of_weight)
        ctx.dtypes = held.dtype, weight.dtype
        return losses[own.held].sum() / divisor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        of_held, of_weight = ctx.saved_tensors
        dtype, weight_dtype = ctx.dtypes
        return (of_held * grads[0]).to(dtype), (of_weight * grads[0]).to(weight_dtype), None, None, None, None


def _chunk(
    x: Float[Tensor, "c h"], weight: Float[Tensor, "v_local h"], targets: Int[Tensor, " c"], own: _Vocabulary, n: float
) -> tuple[Float[Tensor, " c"], Float[Tensor, "c v_local"], Float[Tensor, "c 1"]]:
    """Return each token's loss, this rank's columns of softmax - onehot, and each token's share 1/n of the sum."""
    logits = at_least_fp32(products.output(x, weight))
    logits[:, own.real :] = -torch.inf
    top = logits.amax(1, keepdim=True)
    all_reduce_max(top, own.tp)
    logits -= top
    counted, column = targets != NOT_COUNTED, targets - own.first
    is_own = counted & (column >= 0) & (column < own.real)
    column = torch.where(is_own, column, 0)[:, None]
    of_target = torch.where(is_own[:, None], logits.gather(1, column), 0.0)
    p = logits.exp_()
    sums = torch.cat((p.sum(1, keepdim=True), of_target), 1)
    all_reduce(sums, own.tp)
    p /= sums[:, :1]
    p.scatter_add_(1, column, -is_own[:, None].to(p.dtype))
    loss = torch.where(counted, sums[:, 0].log() - sums[:, 1], 0.0)
    return loss, p, (counted.to(p.dtype) / n)[:, None]
