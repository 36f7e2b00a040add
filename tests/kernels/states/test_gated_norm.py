"""The gated norm is its formula by groups, also where the channels of a group lie apart: outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from twins import assert_like_twin, leaf

from meshwright.kernels.states.gated_norm import gated_rms_norm

C, EPS = 12, 1e-3
F64 = torch.float64


def twin(y: Tensor, z: Tensor, weight: Tensor, eps: float, *, group_size: int) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    u = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (-1, group_size))
    normalised = u / torch.sqrt(u.square().mean(-1, keepdim=True) + eps)
    return (normalised.flatten(-2) * weight).to(y.dtype)


@pytest.mark.parametrize("group_size", [C, 4, 1])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_the_gated_norm_is_its_formula(group_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = leaf(C, dtype=torch.promote_types(dtype, torch.float32))
    inputs = [leaf(5, 2, C, dtype=dtype), leaf(5, 2, C, dtype=dtype), weight, EPS]
    assert_like_twin(gated_rms_norm, twin, inputs, group_size=group_size)


def test_gradients_agree_with_differences() -> None:
    inputs = leaf(3, C, dtype=F64), leaf(3, C, dtype=F64), leaf(C, dtype=F64)
    assert torch.autograd.gradcheck(lambda y, z, w: gated_rms_norm(y, z, w, EPS, group_size=4), inputs)


def test_channels_of_a_group_may_lie_apart() -> None:
    y, z, weight = leaf(5, C, dtype=F64), leaf(5, C, dtype=F64), leaf(C, dtype=F64)
    whole = twin(y, z, weight, EPS, group_size=C)
    u = y * F.silu(z)
    others = u[:, C // 2 :].square().sum(-1)[:, None, None]
    half = [x[..., : C // 2] for x in (y, z, weight)]
    part = gated_rms_norm(*half, EPS, group_size=C, complete=lambda total: total.add_(others))
    torch.testing.assert_close(part, whole[:, : C // 2])
