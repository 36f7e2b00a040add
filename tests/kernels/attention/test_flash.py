"""Attention to parts of the keys: each part is its twin, and the parts together are torch's attention to all keys."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from twins import assert_near

from meshwright.kernels import reference
from meshwright.kernels.attention import flash, flash_cuda
from meshwright.kernels.attention.flash import Sight, merge_parts, partial_attention, partial_attention_gradients

F64 = torch.float64
S, C, B, N, D = 7, 10, 3, 4, 6


def inputs(kv_heads: int, dtype: torch.dtype, s: int = S, c: int = C) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(rows, B, heads, D, dtype=dtype) for rows, heads in ((s, N), (c, kv_heads), (c, kv_heads)))


def ids(rows: int, first: int) -> Tensor:
    """Ascending ids, others in every sample."""
    return torch.randint(first, first + 3, (rows, B)).sort(dim=0).values


def mask_of(s: int, c: int, sight: Sight) -> Tensor:
    seen = torch.ones(1, s, c, dtype=torch.bool)
    if sight.of_queries is not None and sight.of_keys is not None:
        seen = sight.of_queries.T[:, :, None] == sight.of_keys.T[:, None, :]
    return seen & torch.ones(s, c, dtype=torch.bool).tril() if sight.is_causal else seen


def sights(kind: str) -> tuple[Sight, int]:
    """Return a sight, and how many keys it is for; where documents are given some rows see nothing."""
    if "causal" in kind:
        own = ids(S, 5) if "documents" in kind else None
        return Sight(True, own, own), S
    return (Sight(False, ids(S, 6), ids(C, 4)) if "documents" in kind else Sight()), C


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["all", "causal", "documents", "causal documents"])
@pytest.mark.parametrize("entries", [1 << 24, 2 * B * C, 1])
def test_a_part_is_its_twin(dtype: torch.dtype, kv_heads: int, kind: str, entries: int) -> None:
    sight, c = sights(kind)
    sight = sight._replace(mask_entries=entries)  # slabs of all rows, of two, of one
    q, k, v = inputs(kv_heads, dtype, c=c)
    seen = mask_of(S, c, sight)
    out, lse = partial_attention(q, k, v, sight)
    wanted, wanted_lse = reference.partial_attention(q, k, v, seen)
    assert lse.dtype == wanted_lse.dtype == (F64 if dtype == F64 else torch.float32)
    assert torch.equal(lse == -torch.inf, ~seen.any(2).T[:, :, None].expand(S, B, N))
    assert_near(out, wanted)
    torch.testing.assert_close(lse, wanted_lse, **({"rtol": 1e-3, "atol": 1e-3} if dtype == torch.bfloat16 else {}))

    whole_lse = lse.logaddexp(torch.randn_like(lse))  # there are other keys: no row is without any
    grad, whole = torch.randn_like(q), torch.randn_like(q)
    found = partial_attention_gradients(grad, q, k, v, whole, whole_lse, sight)
    expected = reference.partial_attention_gradients(grad, q, k, v, (whole, whole_lse), seen)
    for gradient, twin in zip(found, expected, strict=True):
        assert_near(gradient.to(dtype), twin)


def sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    heads = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*heads, attn_mask=seen[:, None], enable_gqa=True).permute(2, 0, 1, 3)


@pytest.mark.parametrize("masked", [False, True])
def test_parts_together_are_attention_to_all_keys(masked: bool) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, F64))
    sight = Sight(False, torch.zeros(S, B, dtype=torch.int64), torch.zeros(C, B, dtype=torch.int64))
    if masked:  # every query sees a key of the last part; the first part is dark for some
        sight = Sight(False, ids(S, 4), torch.cat([ids(C - 3, 4), torch.tensor([[4], [5], [6]]).expand(3, B)]))
    wanted = sdpa(q, k, v, mask_of(S, C, sight))
    grad = torch.randn_like(wanted)
    of_wanted = torch.autograd.grad(wanted, (q, k, v), grad)

    with torch.no_grad():
        cuts = [slice(0, 3), slice(3, 4), slice(4, C)]
        parts = [Sight(False, sight.of_queries, sight.of_keys[cut]) for cut in cuts]
        out, lse = torch.zeros_like(q), torch.full((S, B, N), -torch.inf, dtype=F64)
        for cut, part in zip(cuts, parts, strict=True):
            out, lse = merge_parts(out, lse, *partial_attention(q, k[cut], v[cut], part))
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-13)
        of_q, of_k, of_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for cut, part in zip(cuts, parts, strict=True):
            some = partial_attention_gradients(grad, q, k[cut], v[cut], out, lse, part)
            of_q += some[0]
            of_k[cut], of_v[cut] = some[1], some[2]
    for found, expected in zip((of_q, of_k, of_v), of_wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_parts_that_see_nothing_merge_to_nothing_and_not_to_nan() -> None:
    nothing = torch.full((1, 1, 1), -torch.inf, dtype=F64)
    out, lse = merge_parts(torch.zeros(1, 1, 1, 2, dtype=F64), nothing, torch.zeros(1, 1, 1, 2, dtype=F64), nothing)
    assert torch.equal(out, torch.zeros(1, 1, 1, 2, dtype=F64))
    assert torch.equal(lse, nothing)


def test_torchs_operator_gives_a_blind_row_a_weight_that_spoils_the_merge() -> None:
    """S9: its log-sum-exp of a row that sees nothing is 0; ours is -inf. Should torch mend it, this test tells."""
    q, k, v = inputs(N, F64, s=2, c=4)
    seen = torch.tensor([[True, True, False, False], [True, True, True, True]]).expand(B, 2, 4)
    wanted = sdpa(q, k, v, seen)

    def merged(blind_as_inf: bool) -> Tensor:
        out, lse = torch.zeros(2, B, N, D, dtype=F64), torch.full((2, B, N), -torch.inf, dtype=F64)
        for cut in (slice(0, 2), slice(2, 4)):
            heads = [x.permute(1, 2, 0, 3) for x in (q, k[cut], v[cut])]
            bias = torch.zeros(B, 1, 2, 2, dtype=F64).masked_fill_(~seen[:, None, :, cut], -torch.inf)
            part, part_lse = flash._forward(*heads, 0.0, False, attn_mask=bias)
            part_lse = part_lse.permute(2, 0, 1)
            if blind_as_inf:
                part_lse = part_lse.masked_fill(~seen[:, :, cut].any(2).T[:, :, None], -torch.inf)
            out, lse = merge_parts(out, lse, part.permute(2, 0, 1, 3), part_lse)
        return out

    torch.testing.assert_close(merged(True), wanted, rtol=0, atol=1e-13)
    assert (merged(False) - wanted).abs().max() > 0.05


@pytest.mark.parametrize(
    ("device", "dtype", "width", "reason"),
    [
        ("cpu", torch.float32, 512, None),
        ("cpu", F64, 64, None),
        ("cuda", torch.bfloat16, 256, None),
        (
            "cuda",
            torch.bfloat16,
            512,
            "(bfloat16, heads of 512) on cuda: the flash operator takes",
        ),
        ("cuda", torch.float32, 64, "(float32, heads of 64) on cuda: the flash operator takes"),
        (
            "mps",
            torch.bfloat16,
            64,
            "(bfloat16, heads of 64) on mps: the flash operator does not",
        ),
    ],
)
def test_what_is_slower_than_flash_says_why(device: str, dtype: torch.dtype, width: int, reason: str | None) -> None:
    found = flash.slower_than_flash(torch.device(device), dtype, width)
    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_without_a_flash_operator_plain_products_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    sight, c = sights("causal documents")
    q, k, v = inputs(2, F64, c=c)
    grad, expected = torch.randn_like(q), partial_attention(q, k, v, sight)
    gradients = partial_attention_gradients(grad, q, k, v, *expected, sight)
    monkeypatch.setattr(flash, "slower_than_flash", lambda device, dtype, width: "no operator")
    monkeypatch.setattr(flash, "_forward", None)
    monkeypatch.setattr(flash, "_backward", None)
    for found, wanted in zip(partial_attention(q, k, v, sight), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    found = partial_attention_gradients(grad, q, k, v, *expected, sight)
    for gradient, wanted in zip(found, gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


# The operators of CUDA, as their meta functions describe them, made of the twins; they are what cannot run here.


def pieces(q: Tensor, k: Tensor, begins: tuple[Tensor | None, Tensor | None]) -> list[tuple[slice, slice]]:
    assert begins[0].dtype == begins[1].dtype == torch.int32
    cuts = [list(zip(at.tolist()[:-1], at.tolist()[1:], strict=True)) for at in begins]
    assert [at[-1] for at in begins] == [len(q), len(k)]
    return [(slice(*mine), slice(*theirs)) for mine, theirs in zip(*cuts, strict=True)]


def cuda_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float) -> tuple[Any, ...]:
    of_q, of_k, max_q, max_k, dropout, is_causal, debug = rest
    assert q.shape[-1] % 8 == 0
    assert dropout == 0.0
    assert not debug
    heal = scale * q.shape[-1] ** 0.5  # the twin divides by the root of the width that it sees
    if of_q is None:
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        seen = mask_of(max_q, max_k, Sight(is_causal))
        out, lse = reference.partial_attention(*(x.transpose(0, 1) for x in (q * heal, k, v)), seen)
        return out.transpose(0, 1), lse.permute(1, 2, 0), None, None, None
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for mine, theirs in pieces(q, k, (of_q, of_k)):
        assert mine.stop - mine.start <= max_q
        assert theirs.stop - theirs.start <= max_k
        seen = mask_of(mine.stop - mine.start, theirs.stop - theirs.start, Sight(is_causal))
        some = reference.partial_attention(*(x[:, None] for x in (q[mine] * heal, k[theirs], v[theirs])), seen)
        out[mine], lse[:, mine] = some[0][:, 0], some[1][:, 0].T.float()
    return out, lse, None, None, None


def cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, scale: float
) -> tuple[Tensor, ...]:
    of_q, of_k, _, _, _, is_causal, _, _ = rest
    heal = scale * q.shape[-1] ** 0.5
    if of_q is None:
        whole = [x.transpose(0, 1) for x in (grad, q * heal, k, v, out)]
        seen = mask_of(q.shape[1], k.shape[1], Sight(is_causal))
        found = reference.partial_attention_gradients(*whole[:4], (whole[4], lse.permute(2, 0, 1)), seen)
        return found[0].transpose(0, 1) * heal, found[1].transpose(0, 1), found[2].transpose(0, 1)
    results = tuple(torch.empty_like(x) for x in (q, k, v))
    for mine, theirs in pieces(q, k, (of_q, of_k)):
        seen = mask_of(mine.stop - mine.start, theirs.stop - theirs.start, Sight(is_causal))
        *some, mixed = (x[:, None] for x in (grad[mine], q[mine] * heal, k[theirs], v[theirs], out[mine]))
        found = reference.partial_attention_gradients(*some, (mixed, lse[:, mine].T[:, None]), seen)
        results[0][mine], results[1][theirs], results[2][theirs] = found[0][:, 0] * heal, found[1][:, 0], found[2][:, 0]
    return results


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["all", "causal", "documents", "causal documents", "nothing in common"])
def test_pieces_of_documents_for_cuda_are_the_mask(kind: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_cuda, "_forward", cuda_forward)
    monkeypatch.setattr(flash_cuda, "_backward", cuda_backward)
    sight, c = sights(kind)
    if kind == "nothing in common":
        sight = Sight(False, ids(S, 9), ids(C, 1))
    q, k, v = inputs(kv_heads, F64, c=c)
    by = (sight.is_causal, sight.of_queries, sight.of_keys)
    out, lse = flash_cuda.forward(q, k, v, by)
    wanted, wanted_lse = partial_attention(q, k, v, sight)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse.to(F64), wanted_lse, rtol=1e-6, atol=1e-6)  # the operator's is fp32

    whole_lse, grad, whole = (
        wanted_lse.logaddexp(torch.randn_like(wanted_lse)),
        torch.randn_like(q),
        torch.randn_like(q),
    )
    found = flash_cuda.backward(grad, q, k, v, (whole, whole_lse), by)
    expected = partial_attention_gradients(grad, q, k, v, whole, whole_lse, sight)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_pieces_want_ascending_documents() -> None:
    back = torch.tensor([[2], [1], [2]])
    with pytest.raises(ValueError, match="document ids fall along a sequence"):
        flash_cuda.pieces_of(back, back)
