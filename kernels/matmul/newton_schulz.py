"""Orthogonalise matrices by products alone: Newton-Schulz with the quintic of Keller Jordan's Muon (2024).

    X = G / |G|                     every singular value is now in [0, 1]
    X <- a X + (b A + c A A) X      with A = X X^T; singular values go x -> a x + b x^3 + c x^5, vectors stay
    after 5 steps                   U S V^T became U S' V^T

The coefficients make the slope at 0 as large as it may be: 3.4445 a step, so that singular values from 0.002 of
the norm on end within (0.68, 1.21), and more steps leave them there. UV^T itself is not reached and not needed
(https://kellerjordan.github.io/posts/muon/). The products are of the short side: 2 m^2 n + m^3 multiplications a step.

This file knows no optimizer. Its twin in tests is the singular value decomposition.
"""

import torch
from jaxtyping import Float
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
# Of a matrix below this norm the direction is noise, and is left as small as it is.
EPS = 1e-7


def orthogonalise(matrices: Float[Tensor, "k rows cols"], steps: int) -> Float[Tensor, "k rows cols"]:
    """Bring the singular values of each matrix near 1, in the matrices' type."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / norms(x).to(x.dtype)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, polynomial, x, beta=A)
    return x.mT if is_tall else x


def norms(matrices: Float[Tensor, "k rows cols"]) -> Float[Tensor, "k 1 1"]:
    """Return each matrix's norm over all elements in at least fp32, not below EPS.

    Row by row first: a CPU adds the squares of one long tensor up with an error that grows with its length.
    """
    wide = torch.promote_types(matrices.dtype, torch.float32)
    by_row = torch.linalg.vector_norm(matrices, dim=2, keepdim=True, dtype=wide)
    whole: Tensor = torch.linalg.vector_norm(by_row, dim=1, keepdim=True)
    return whole.clamp(min=EPS)


def multiplications(rows: int, cols: int, steps: int) -> float:
    """Return how many multiplications one matrix takes."""
    short, long = sorted((rows, cols))
    return steps * (2.0 * short * short * long + float(short) ** 3)
