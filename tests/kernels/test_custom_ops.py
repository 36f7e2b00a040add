"""What torch.compile is told of our own operators is what they return: shape, type and strides."""

import pytest
import torch
from torch import Tensor

from meshwright.kernels.attention.blocks import attention_by_blocks, attention_by_blocks_gradients
from meshwright.kernels.choose import Choices, use
from meshwright.kernels.matmul.grouped import grouped_product, grouped_product_gradients
from meshwright.kernels.matmul.products import onednn_product
from meshwright.kernels.states.selective_scan import chunked_selective_scan, chunked_selective_scan_gradients
from meshwright.kernels.states.ssd import chunked_ssd, chunked_ssd_gradients

CHECKS = ("test_schema", "test_faketensor")
WIDTHS = [(8, 16), (5, 7), (1, 3)]


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_by_blocks(heads: int, kv_heads: int, batch: int, narrow: bool) -> None:
    dtype = torch.bfloat16 if narrow else torch.float32
    q, grad = rows(70, batch, heads, 6, dtype=dtype), rows(70, batch, heads, 6, dtype=dtype)
    k, v = rows(70, batch, kv_heads, 6, dtype=dtype), rows(70, batch, kv_heads, 6, dtype=dtype)
    document = (torch.arange(70)[:, None] // 30).repeat(1, batch)
    for mask in (None, document):
        given = (q, k, v, mask, True, narrow, 0.3)
        torch.library.opcheck(attention_by_blocks, given, test_utils=CHECKS)
        torch.library.opcheck(attention_by_blocks_gradients, (grad, *given), test_utils=CHECKS)


@pytest.mark.parametrize(("wide", "narrow"), WIDTHS)
def test_onednn_product(wide: int, narrow: int) -> None:
    for x in (rows(6, wide), rows(wide, 6).T):
        torch.library.opcheck(onednn_product, (x, rows(narrow, wide)), test_utils=CHECKS)


@pytest.mark.parametrize("choices", [Choices(), Choices("onednn", "onednn", "onednn")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("wide", "narrow"), WIDTHS)
def test_grouped_product(wide: int, narrow: int, dtype: torch.dtype, choices: Choices) -> None:
    use(choices)
    counts, weight = torch.tensor([4, 0, 3]), rows(3, narrow, wide, dtype=dtype)
    for x in (rows(7, wide, dtype=dtype), rows(wide, 7, dtype=dtype).T):
        torch.library.opcheck(grouped_product, (x, weight, counts, dtype, False), test_utils=CHECKS)
        grad = rows(7, narrow, dtype=dtype)
        torch.library.opcheck(grouped_product_gradients, (grad, x, weight, counts, False), test_utils=CHECKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begins", [None, torch.arange(7)[:, None] % 3 == torch.arange(2)])
def test_chunked_ssd(dtype: torch.dtype, begins: Tensor | None) -> None:
    x, b = rows(7, 2, 4, 3, dtype=dtype), rows(7, 2, 2, 5, dtype=dtype)
    given = (x, rows(7, 2, 4).abs(), -rows(4).abs(), b, b, rows(4), begins)
    torch.library.opcheck(chunked_ssd, (*given, rows(2, 4, 3, 5), 3, 2), test_utils=CHECKS)
    states = rows(4, 4, 5, 6)
    torch.library.opcheck(chunked_ssd_gradients, (x, states[-1].clone(), *given, states, 3, 2), test_utils=CHECKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begins", [None, torch.arange(7)[:, None] % 3 == torch.arange(2)])
def test_chunked_selective_scan(dtype: torch.dtype, begins: Tensor | None) -> None:
    x, b = rows(7, 2, 4, dtype=dtype), rows(7, 2, 5, dtype=dtype)
    given = (x, rows(7, 2, 4).abs(), -rows(4, 5).abs(), b, b, rows(4), begins)
    torch.library.opcheck(chunked_selective_scan, (*given, rows(2, 4, 5), 3), test_utils=CHECKS)
    states = rows(4, 2, 4, 5)
    inputs = (x, states[-1].clone(), *given, states, 3)
    torch.library.opcheck(chunked_selective_scan_gradients, inputs, test_utils=CHECKS)
