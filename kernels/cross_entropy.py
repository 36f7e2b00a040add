"""The output layer and its cross entropy in one, so that all the logits never exist together."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meshwright.kernels.linear import linear
from meshwright.kernels.precision import at_least_fp32
from meshwright.kernels.reference import NOT_COUNTED

CHUNK = 1024


def linear_cross_entropy(
    x: Float[Tensor, "t h"], weight: Float[Tensor, "v h"], targets: Int[Tensor, " t"], *, divisor: float
) -> Float[Tensor, ""]:
    """Return the sum of the counted tokens' cross entropy, over `divisor`; targets of -100 are not counted."""
    sums = [
        checkpoint(_sum_of_chunk, rows, weight, wanted, use_reentrant=False)
        for rows, wanted in zip(torch.split(x, CHUNK), torch.split(targets, CHUNK), strict=True)
    ]
    return torch.stack(sums).sum() / divisor


def _sum_of_chunk(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = at_least_fp32(linear(x, weight))
    of_target = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets != NOT_COUNTED, logits.logsumexp(-1) - of_target, 0).sum()
