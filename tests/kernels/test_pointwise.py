"""rms_norm and apply_rope are their twins, and their hand-written gradients are right."""

import pytest
import torch
from twins import assert_like_twin, leaf

from meshwright.kernels import reference
from meshwright.kernels.attention.rope import apply_rope
from meshwright.kernels.norms import rms_norm
from meshwright.kernels.precision import at_least_fp32

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
F64 = torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 7), (1, 33), (2, 3, 4, 6)])
def test_rms_norm_is_its_twin(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_like_twin(rms_norm, reference.rms_norm, [leaf(*shape, dtype=dtype), leaf(shape[-1], dtype=dtype), 1e-5])


def test_rms_norm_of_bf16_takes_fp32_weights_and_of_zeros_is_zero() -> None:
    assert_like_twin(rms_norm, reference.rms_norm, [leaf(4, 8, dtype=torch.bfloat16), leaf(8), 1e-6])
    assert torch.equal(rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6), torch.zeros(2, 4))


def test_rms_norm_keeps_its_dtype_under_autocast() -> None:
    x, weight = leaf(4, 8), leaf(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert_like_twin(rms_norm, reference.rms_norm, [x, weight, 1e-5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 2, 6), (1, 1, 1, 2), (9, 2, 3, 16)])
def test_apply_rope_is_its_twin(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    angle = torch.randn(shape[0], shape[3] // 2, dtype=torch.promote_types(dtype, torch.float32))
    assert_like_twin(apply_rope, reference.apply_rope, [leaf(*shape, dtype=dtype), angle.cos(), angle.sin()])


def test_rope_turns_without_changing_lengths() -> None:
    x, angle = torch.randn(5, 2, 3, 8, dtype=F64), torch.randn(5, 4, dtype=F64)
    y = apply_rope(x, angle.cos(), angle.sin())
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(y, x)


def test_gradients_agree_with_differences() -> None:
    angle = torch.randn(3, 2, dtype=F64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (leaf(3, 5, dtype=F64), leaf(5, dtype=F64)))
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, angle.cos(), angle.sin()), leaf(3, 1, 2, 4, dtype=F64))


def test_at_least_fp32_widens_bf16_only() -> None:
    for dtype, wide in [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (F64, F64)]:
        assert at_least_fp32(torch.ones(1, dtype=dtype)).dtype == wide
    x = torch.ones(1)
    assert at_least_fp32(x) is x
