"""The shifted multiply-adds are the convolution, token by token, with halos and documents: outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from twins import assert_like_twin, leaf

from meshwright.kernels.states import reference
from meshwright.kernels.states.conv import causal_conv, next_conv, tail

S, B, C, K = 9, 2, 5, 4
F64 = torch.float64


def begins() -> Tensor:
    found = torch.zeros(S, B, dtype=torch.bool)
    found[[1, 5, 7], 0], found[[0, 8], 1] = True, True
    return found


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("where", [None, begins()])
@pytest.mark.parametrize("with_halo", [True, False])
@pytest.mark.parametrize("s", [S, 2, 1])
def test_the_convolution_is_its_twin(silu: bool, where: Tensor | None, with_halo: bool, s: int) -> None:
    halo = leaf(K - 1, B, C, dtype=F64) if with_halo else None
    where = None if where is None else where[:s]

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None) -> Tensor:
        return causal_conv(x, weight, bias, halo=before, begins=where, silu=silu)

    def twin(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None) -> Tensor:
        return reference.causal_conv(x, weight, bias, halo=before, begins=where, silu=silu)

    assert_like_twin(kernel, twin, [leaf(s, B, C, dtype=F64), leaf(C, K, dtype=F64), leaf(C, dtype=F64), halo])
    assert_like_twin(kernel, twin, [leaf(s, B, C, dtype=F64), leaf(C, K, dtype=F64), None, halo])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torch_s_convolution_in_any_type(dtype: torch.dtype) -> None:
    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        padded = F.pad(x.float().permute(1, 2, 0), (K - 1, 0))
        y = F.silu(F.conv1d(padded, weight.float()[:, None], bias.float(), groups=C))
        return y.permute(2, 0, 1).to(x.dtype)

    assert_like_twin(causal_conv, theirs, [leaf(S, B, C, dtype=dtype), leaf(C, K, dtype=dtype), leaf(C, dtype=dtype)])


def test_a_sequence_in_pieces_is_the_whole_one() -> None:
    x, weight = leaf(S, B, C, dtype=F64), leaf(C, K, dtype=F64)
    halo, pieces = torch.zeros(K - 1, B, C, dtype=F64), []
    for piece in x.split([1, 1, 5, 2]):
        pieces.append(causal_conv(piece, weight, halo=halo))
        halo = tail(piece, halo)
    torch.testing.assert_close(torch.cat(pieces), causal_conv(x, weight))


@pytest.mark.parametrize("bias", [None, leaf(C, dtype=F64)])
def test_token_by_token_is_the_whole_sequence(bias: Tensor | None) -> None:
    x, weight = leaf(S, B, C, dtype=F64), leaf(C, K, dtype=F64)
    halo, tokens = torch.zeros(K - 1, B, C, dtype=F64), []
    for token in x.split(1):
        made, halo = next_conv(token, weight, bias, halo)
        tokens.append(made)
    torch.testing.assert_close(torch.cat(tokens), causal_conv(x, weight, bias))
    torch.testing.assert_close(halo, x[S - K + 1 :])


def test_kept_for_the_backward_are_the_inputs() -> None:
    x, weight, sizes = leaf(S, B, C), leaf(C, K), []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: sizes.append(kept.numel()) or kept, lambda kept: kept):
        causal_conv(x, weight)
    assert sum(sizes) == x.numel() + weight.numel()


def test_a_halo_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a halo of 2 tokens; a convolution of 4 taps needs 3"):
        causal_conv(leaf(S, B, C), leaf(C, K), halo=torch.zeros(2, B, C))
