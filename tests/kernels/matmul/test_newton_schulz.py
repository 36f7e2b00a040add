"""Newton-Schulz keeps the singular vectors and brings the singular values near 1: held to torch's SVD."""

import pytest
import torch
from torch import Tensor

from meshwright.kernels.matmul.newton_schulz import EPS, multiplications, norms, orthogonalise


def some(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 20, 48), (3, 48, 20), (1, 1, 7)])
def test_singular_vectors_stay_and_values_come_near_one(shape: tuple[int, int, int]) -> None:
    x = some(*shape)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    in_its_basis = u.mT @ orthogonalise(x, 5) @ vh.mT  # diagonal where the vectors are the same
    values = in_its_basis.diagonal(dim1=1, dim2=2)
    assert (in_its_basis - torch.diag_embed(values)).abs().max() < 1e-10
    expected = s / torch.linalg.vector_norm(s, dim=1, keepdim=True)
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)


def test_singular_values_from_a_threshold_on_end_in_the_known_band() -> None:
    """The author's page: S' lies around 1, not at it."""
    s = torch.logspace(-2.3, 0, 40, dtype=torch.float64)
    assert s.min() / s.norm() > 0.002
    u, _, vh = torch.linalg.svd(some(1, 40, 50), full_matrices=False)
    values = torch.linalg.svdvals(orthogonalise((u * s) @ vh, 5))
    assert values.min() > 0.68
    assert values.max() < 1.21


def test_each_matrix_of_a_stack_is_computed_by_itself() -> None:
    x = some(4, 11, 6) * torch.tensor([1.0, 1e-3, 1e3, 7.0], dtype=torch.float64)[:, None, None]
    for one, result in zip(x, orthogonalise(x, 5), strict=True):
        torch.testing.assert_close(orthogonalise(one[None], 5)[0], result, rtol=1e-12, atol=1e-12)


def test_neither_size_nor_side_matters() -> None:
    x = some(2, 12, 5)
    result = orthogonalise(x, 5)
    torch.testing.assert_close(orthogonalise(x * 1e-3, 5), result, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(orthogonalise(x.mT.contiguous(), 5).mT, result, rtol=1e-10, atol=1e-12)


def test_nothing_becomes_nothing_and_noise_stays_small() -> None:
    assert orthogonalise(torch.zeros(2, 4, 5), 5).abs().max() == 0
    assert orthogonalise(torch.full((1, 4, 5), EPS * 1e-6), 5).abs().max() < 1e-3


def test_bf16_is_near_fp64_and_stays_bf16() -> None:
    x = some(2, 24, 40)
    found = orthogonalise(x.bfloat16(), 5)
    assert found.dtype == torch.bfloat16
    assert norms(x.bfloat16()).dtype == torch.float32
    # Five steps of products in bf16 (2^-9 each), amplified where a singular value is small.
    assert (found.double() - orthogonalise(x, 5)).norm() < 0.05 * x.shape[1] ** 0.5 * 2**0.5


def test_the_short_side_is_what_costs() -> None:
    assert multiplications(4, 10, 5) == multiplications(10, 4, 5) == 5 * (2 * 4 * 4 * 10 + 4**3)
