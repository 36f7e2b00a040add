"""attention is its twin: flash or by blocks, with groups of heads, documents, and sizes around a block's."""

from typing import Any

import pytest
import torch
from twins import assert_like_twin, leaf

from meshwright.kernels import reference
from meshwright.kernels.attention import attention as attention_kernel
from meshwright.kernels.attention import blocks
from meshwright.kernels.attention.attention import attention, cached_attention
from meshwright.kernels.attention.blocks import BLOCK, block_attention
from meshwright.kernels.attention.seen import Seen
from meshwright.kernels.choose import LONG, Choices, use

F64 = torch.float64
BLOCKS = Choices(fp32_attention="blocks", bf16_attention="blocks")
WAYS = [Choices(), BLOCKS, Choices(bf16_attention="blocks_fp32")]


def documents(s: int, b: int) -> torch.Tensor:
    """Return ids that grow along the sequence, different in every sample."""
    return torch.randint(0, 3, (s, b)).sort(dim=0).values


@pytest.mark.parametrize("choices", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masks", ["causal", "all", "documents", "all of a document"])
def test_attention_is_its_twin(choices: Choices, dtype: torch.dtype, kv_heads: int, masks: str) -> None:
    use(choices)
    s, b, d = 70, 3, 6
    q, k, v = (leaf(s, b, heads, d, dtype=dtype) for heads in (4, kv_heads, kv_heads))
    document = documents(s, b) if "document" in masks else None
    assert_like_twin(attention, reference.attention, [q, k, v], seen=Seen("all" not in masks), document=document)


@pytest.mark.parametrize(
    ("choices", "dtype", "tokens", "narrow"),
    [
        (BLOCKS, torch.float32, 3, True),
        (BLOCKS, torch.bfloat16, 3, True),
        (Choices(bf16_attention="blocks_fp32"), torch.bfloat16, 3, False),
        (Choices(), torch.float32, 3, None),
        (Choices(fp32_attention="blocks"), torch.bfloat16, 3, None),
        (BLOCKS, F64, 3, None),
        (BLOCKS, torch.float32, LONG - 1, True),
        (BLOCKS, torch.float32, LONG, None),
        (Choices(fp32_long_attention="blocks"), torch.float32, LONG, True),
        (Choices(fp32_long_attention="blocks"), torch.float32, LONG - 1, None),
        (Choices(bf16_long_attention="blocks_fp32"), torch.bfloat16, LONG, False),
    ],
)
def test_the_chosen_way_is_taken(
    choices: Choices, dtype: torch.dtype, tokens: int, narrow: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []

    def watched(*given: Any, narrow: bool, **named: Any) -> torch.Tensor:
        taken.append(narrow)
        return block_attention(*given, narrow=narrow, **named)

    monkeypatch.setattr(attention_kernel, "block_attention", watched)
    use(choices)
    x = torch.randn(tokens, 1, 2, 4, dtype=dtype)
    attention(x, x, x)
    assert taken == ([] if narrow is None else [narrow])


@pytest.mark.parametrize("s", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("scores", [1, 1 << 14, 1 << 20])
def test_blocks_and_groups_of_heads_of_any_size_are_the_twin(
    s: int, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "SCORES", scores)
    q, k, v = (leaf(s, 2, heads, 4) for heads in (6, 3, 3))
    assert_like_twin(block_attention, reference.attention, [q, k, v])
    assert_like_twin(block_attention, reference.attention, [q, k, v], document=documents(s, 2))


def test_gradients_of_blocks_agree_with_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 2)
    q, k, v = (leaf(5, 1, heads, 3, dtype=F64) for heads in (2, 1, 1))
    assert torch.autograd.gradcheck(block_attention, (q, k, v))


def test_a_result_does_not_depend_on_later_tokens() -> None:
    use(BLOCKS)
    q, k, v = (torch.randn(90, 1, 2, 4) for _ in range(3))
    changed = k.clone()
    changed[80:] = 1e4
    assert torch.equal(attention(q, changed, v)[:80], attention(q, k, v)[:80])


def test_documents_do_not_see_each_other() -> None:
    use(BLOCKS)
    q, k, v = (torch.randn(90, 1, 2, 4) for _ in range(3))
    document = (torch.arange(90) >= 75)[:, None].to(torch.int64)
    alone = attention(q[75:], k[75:], v[75:])
    torch.testing.assert_close(attention(q, k, v, document=document)[75:], alone)


def test_the_same_call_gives_the_same_bits() -> None:
    use(BLOCKS)
    q, k, v = (leaf(150, 2, 4, 8) for _ in range(3))
    first, second = (torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("s", [1, 3, 7])
def test_cached_attention_is_the_end_of_the_whole(dtype: torch.dtype, s: int) -> None:
    q, k, v = (torch.randn(7, 2, heads, 4, dtype=dtype) for heads in (4, 2, 2))
    last = cached_attention(q[7 - s :], k, v)
    torch.testing.assert_close(last, reference.cached_attention(q[7 - s :], k, v))
    torch.testing.assert_close(last, attention(q, k, v)[7 - s :])


def test_autocast_computes_attention_in_bf16() -> None:
    for choices in WAYS:
        use(choices)
        q, k, v = (leaf(9, 1, 2, 4) for _ in range(3))
        with torch.autocast("cpu", torch.bfloat16):
            y = attention(q, k, v)
            assert cached_attention(q, k, v).dtype == torch.bfloat16
        assert y.dtype == torch.bfloat16
        assert torch.autograd.grad(y.sum(), q)[0].dtype == torch.float32


def test_documents_keep_no_mask_for_the_backward() -> None:
    """Besides what is kept without them: the ids of the documents, 8 bytes a token."""
    q, k, v = (torch.randn(256, 2, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    kept = []
    for document in (None, documents(256, 2)):
        saved: dict[int, int] = {}

        def pack(x: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attended = attention(q, k, v, document=document)
        assert attended.requires_grad
        kept.append(sum(saved.values()))
    assert kept[1] <= kept[0] + 256 * 2 * 8
