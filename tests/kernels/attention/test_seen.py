"""Windows, blocks, biases, dropout, scales and values of another width: every way is the twin, which masks [s, s]."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig
from transformers.masking_utils import create_sliding_window_causal_mask
from twins import assert_like_twin, assert_near, leaf

from meshwright.kernels import reference
from meshwright.kernels.attention import tiles
from meshwright.kernels.attention.attention import attention, cached_attention
from meshwright.kernels.attention.flash import Sight, merge_parts, partial_attention, partial_attention_gradients
from meshwright.kernels.attention.seen import Blocks, Seen
from meshwright.kernels.choose import Choices, use
from meshwright.kernels.limits import USUAL

F64 = torch.float64
S, B, N, K, D = 37, 2, 6, 2, 4


class EveryThird:
    """Drops what it is told by the places alone."""

    def from_head(self, first: int) -> "EveryThird":
        raise AssertionError("all heads are here")

    def factors(self, sample: int, heads: range, queries: range, keys: range, like: Tensor) -> Tensor:
        h, i, j = torch.meshgrid(*(torch.arange(x.start, x.stop) for x in (heads, queries, keys)), indexing="ij")
        return ((5 * h + 7 * i + 3 * j + sample) % 3 != 0).to(like.dtype) * 1.5


def bias(is_causal: bool = True) -> Tensor:
    return leaf(N, S if is_causal else 2 * S - 1, dtype=F64)


SEEN = {
    "all": Seen(False),
    "scale": Seen(scale=0.7),
    "window 1": Seen(window=1),
    "window 5": Seen(window=5, scale=0.3),
    "window to both sides": Seen(False, window=4),
    "window beyond the sample": Seen(window=S + 3),
    "blocks": Seen(blocks=Blocks(4, 2, 1)),
    "blocks without leading ones": Seen(blocks=Blocks(3, 1)),
    "blocks that meet": Seen(blocks=Blocks(5, 3, 4)),
    "blocks and a window": Seen(blocks=Blocks(4, 2, 1), window=11),
    "bias": Seen(bias=torch.zeros(0)),
    "bias to both sides": Seen(False, bias=torch.zeros(0)),
    "bias, window": Seen(window=6, bias=torch.zeros(0)),
    "bias, blocks": Seen(blocks=Blocks(4, 2, 1), bias=torch.zeros(0)),
    "dropout": Seen(drop=EveryThird()),
    "dropout, blocks, bias": Seen(blocks=Blocks(4, 1, 1), bias=torch.zeros(0), drop=EveryThird()),
}


def seen_of(kind: str) -> Seen:
    seen = SEEN[kind]
    return seen if seen.bias is None else seen._replace(bias=bias(seen.is_causal))


def documents(s: int, b: int) -> Tensor:
    return torch.randint(0, 3, (s, b)).sort(dim=0).values


@pytest.mark.parametrize("entries", [USUAL.mask_entries, 100])
@pytest.mark.parametrize("kind", SEEN)
def test_whatever_is_seen_is_the_twin(kind: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "ROWS", 5)
    seen = seen_of(kind)
    q, k, v = leaf(S, B, N, D, dtype=F64), leaf(S, B, K, D, dtype=F64), leaf(S, B, K, 3, dtype=F64)
    of = [q, k, v] if seen.bias is None else [q, k, v, seen.bias]
    for document in (None, documents(S, B)):
        result = attention(q, k, v, seen, document=document, mask_entries=entries)
        expected = reference.attention(q, k, v, seen, document=document)
        assert_near(result, expected)
        above = torch.randn_like(expected)
        found, wanted = (torch.autograd.grad(y, of, above) for y in (result, expected))
        for gradient, twin in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, twin, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("choices", [Choices(), Choices(fp32_attention="blocks", bf16_attention="blocks")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["all", "scale", "window 5"])
def test_a_scale_and_values_of_another_width_in_every_dtype(choices: Choices, dtype: torch.dtype, kind: str) -> None:
    use(choices)
    for width in (D, 3):
        inputs = [leaf(S, B, N, D, dtype=dtype), leaf(S, B, K, D, dtype=dtype), leaf(S, B, K, width, dtype=dtype)]
        assert_like_twin(attention, reference.attention, inputs, seen=seen_of(kind))


def test_a_window_is_that_of_transformers() -> None:
    config = MistralConfig(sliding_window=5, attn_implementation="eager")
    theirs = create_sliding_window_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, S, 8),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(S)[None],
    )
    ours = Seen(window=5).mask(torch.arange(S), torch.arange(S))
    assert torch.equal(theirs[0, 0] == 0, ours)


def test_parts_of_the_keys_at_their_places_are_attention_to_all() -> None:
    seen = Seen(window=9, bias=bias(), scale=0.4, drop=EveryThird())
    q, k, v = leaf(S, B, N, D, dtype=F64), leaf(S, B, K, D, dtype=F64), leaf(S, B, K, 3, dtype=F64)
    wanted = reference.attention(q, k, v, seen)
    grad = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, (q, k, v, seen.bias), grad)
    out, lse = torch.zeros_like(wanted), torch.full((S, B, N), -torch.inf, dtype=F64)
    totals = [torch.zeros_like(x) for x in (q, k, v, seen.bias)]
    cuts = [(rows, keys) for rows in (slice(0, 20), slice(20, S)) for keys in (slice(0, 15), slice(15, S))]
    with torch.no_grad():
        sights = [Sight(scale=0.4, seen=seen, first_query=at.start, first_key=keys.start) for at, keys in cuts]
        for (at, keys), sight in zip(cuts, sights, strict=True):
            part = partial_attention(q[at], k[keys], v[keys], sight)
            out[at], lse[at] = merge_parts(out[at], lse[at], *part)
        torch.testing.assert_close(out, wanted)
        for (at, keys), sight in zip(cuts, sights, strict=True):
            given = (grad[at], q[at], k[keys], v[keys], out[at], lse[at])
            some = partial_attention_gradients(*given, sight, totals[3])
            totals[0][at] += some[0]
            totals[1][keys] += some[1]
            totals[2][keys] += some[2]
    for found, twin in zip(totals, expected, strict=True):
        torch.testing.assert_close(found, twin, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["scale", "window 5", "bias", "bias, window", "blocks", "bias, blocks"])
@pytest.mark.parametrize("s", [1, 4, S])
def test_the_last_queries_of_a_cache_are_the_end_of_the_whole(kind: str, s: int) -> None:
    seen = seen_of(kind)
    q, k, v = leaf(S, B, N, D, dtype=F64), leaf(S, B, K, D, dtype=F64), leaf(S, B, K, 3, dtype=F64)
    wanted = reference.attention(q, k, v, seen)[S - s :]
    torch.testing.assert_close(cached_attention(q[S - s :], k, v, seen), wanted)
    if seen.window:  # the first keys may be gone
        first = S - s - seen.window + 1
        if first > 0:
            torch.testing.assert_close(cached_attention(q[S - s :], k[first:], v[first:], seen, first), wanted)


@pytest.mark.parametrize("held", [0, 5])
@pytest.mark.parametrize("kind", ["all", "window 5", "bias", "blocks"])
def test_no_queries_of_a_cache_have_no_values(kind: str, held: int) -> None:
    q, k, v = leaf(0, B, N, D), leaf(held, B, K, D), leaf(held, B, K, 3)
    assert cached_attention(q, k, v, seen_of(kind)).shape == (0, B, N, 3)


def test_the_gradient_of_a_bias_agrees_with_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "ROWS", 2)
    q, k, v = (leaf(5, 1, heads, 3, dtype=F64) for heads in (2, 1, 1))

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attention(q, k, v, Seen(window=4, bias=table))

    assert torch.autograd.gradcheck(attend, (q, k, v, leaf(2, 4, dtype=F64)))


def test_a_window_computes_and_keeps_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    s, window, made = 1024, 32, []
    whole_bmm = torch.bmm

    def counted(a: Tensor, b: Tensor, **named: Any) -> Tensor:
        made.append(a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2])
        return whole_bmm(a, b, **named)

    monkeypatch.setattr(torch, "bmm", counted)
    q, k, v = (leaf(s, 1, 2, 8) for _ in range(3))
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = attention(q, k, v, Seen(window=window))
    y.sum().backward()
    assert sum(saved.values()) <= 4 * (4 * q.numel() + s * 2)  # q, k, v, out, lse
    assert sum(made) <= 7 * 2 * s * (window + tiles.ROWS) * 8
    assert sum(made) < 7 * 2 * s * s * 8 / 8


def test_a_way_to_see_that_is_none_says_why() -> None:
    assert Seen(window=-1).problems() == [
        "window = -1: must be a whole number of at least 1, or 0 for none; 1 would fit"
    ]
    assert "size and local must be whole numbers of 1 or more" in Seen(blocks=Blocks(0, 1)).problems()[0]
    assert "block-sparse attention is causal" in Seen(False, blocks=Blocks(4, 1)).problems()[0]
    assert Seen(window=3).problems() == []
