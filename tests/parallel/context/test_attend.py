"""Attention over samples spread along cp is torch's attention to the whole sample: outputs and all gradients."""

import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from rank_pool import run_ranks
from torch import Tensor

from meshwright.parallel.context.attend import context_attention
from meshwright.parallel.context.order import Documents, zigzag_part
from meshwright.parallel.context.ring import ring_attention
from meshwright.parallel.context.ulysses import ulysses_attention
from meshwright.parallel.mesh import Axis

S, B, N, D = 24, 2, 12, 6
SLOW = [(2, 2), (4, 4), (4, 2), (4, 1)]
WAYS = ["ring", "ulysses"]
Lengths = list[list[int]]


def documents(lengths: Lengths) -> Tensor:
    """Return ascending ids [s, b] from the lengths of each sample's documents; ids need not begin at 0."""
    rows = [
        torch.repeat_interleave(torch.arange(len(row)) + 7 * at, torch.tensor(row)) for at, row in enumerate(lengths)
    ]
    return torch.stack(rows, dim=1)


def judge(q: Tensor, k: Tensor, v: Tensor, document: Tensor | None) -> Tensor:
    """torch's attention to the whole sample on one process."""
    seen = torch.ones(S, S, dtype=torch.bool).tril()[None, None]
    if document is not None:
        seen = seen & (document.T[:, None, :, None] == document.T[:, None, None, :])
    heads = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True).permute(2, 0, 1, 3)


def errors(cp: Axis, way: str, kv_heads: int, lengths: Lengths | None, dtype: torch.dtype) -> list[float]:
    """Return how far output and gradients of q, k and v are from the judge's, relative to each one's largest value.

    A token that sees only itself gives q and k no gradient: what is left of the sum of ones is measured against 1.
    """
    torch.manual_seed(3)
    whole = [torch.randn(S, B, heads, D, dtype=dtype).requires_grad_() for heads in (N, kv_heads, kv_heads)]
    document = None if lengths is None else documents(lengths)
    wanted = judge(*(x.double() for x in whole), document)
    grad = torch.randn(S, B, N, D, dtype=dtype)
    of_wanted = torch.autograd.grad(wanted, whole, grad.double())

    held = [zigzag_part(x.detach(), cp).requires_grad_() for x in whole]
    result = context_attention(*held, cp, way, Documents(document))
    gradients = torch.autograd.grad(result, held, zigzag_part(grad, cp))
    return [
        ((ours.double() - zigzag_part(theirs, cp)).abs().max() / scale(theirs)).item()
        for ours, theirs in zip((result, *gradients), (wanted, *of_wanted), strict=True)
    ]


def scale(x: Tensor) -> float:
    largest = x.abs().max().item()
    return largest if largest > 1e-9 else 1.0


def many(cp: Axis, way: str, kv_heads: int, several: list[Lengths | None], dtype: torch.dtype) -> list[list[float]]:
    return [errors(cp, way, kv_heads, lengths, dtype) for lengths in several]


def assert_all_below(found: list[list[list[float]]], bound: float) -> None:
    for rank, cases in enumerate(found):
        for at, case in enumerate(cases):
            for name, error in zip(("output", "dq", "dk", "dv"), case, strict=True):
                assert error <= bound, f"{name} of rank {rank}, case {at}: {error}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("cp", "kv_heads"),
    [(1, 2), (2, 4), (2, 1), (3, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in SLOW)],
)
def test_spread_attention_is_whole_attention(cp: int, kv_heads: int, way: str) -> None:
    several = [None, [[S], [S]], [[5, 19], [9, 4, 11]]]
    assert_all_below(run_ranks(cp, many, way, kv_heads, several, torch.float64), 1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cp", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_documents_may_end_anywhere(cp: int, way: str) -> None:
    chunk = S // (2 * cp)
    at_edges: list[Lengths | None] = [[[end, S - end], [S]] for end in range(chunk, S, chunk)]
    in_mid_chunk: list[Lengths | None] = [[[end, S - end], [S - end, end]] for end in range(1, S, chunk)]
    # The last document begins where the documents of all chunks but the last have ended; one document a token.
    corners: list[Lengths | None] = [
        [[1] * S, [1] * S],
        [[1] * S, [S]],
        [[S - 1, 1], [1, S - 1]],
        [[chunk] * (2 * cp)] * 2,
    ]
    several = at_edges + in_mid_chunk + corners
    assert_all_below(run_ranks(cp, many, way, 2, several, torch.float64), 1e-9)


@seed(20)
@settings(max_examples=4, deadline=None, database=None)
@given(
    ends=st.lists(st.sets(st.integers(1, S - 1)), min_size=4 * B, max_size=4 * B), kv_heads=st.sampled_from([1, 2, 4])
)
def test_any_documents_are_attended_alone(ends: list[set[int]], kv_heads: int) -> None:
    rows = [[end - begin for begin, end in itertools.pairwise([0, *sorted(row), S])] for row in ends]
    several: list[Lengths | None] = [rows[at : at + B] for at in range(0, len(rows), B)]
    logging.getLogger(__name__).info("seed 20: %s", several)
    assert_all_below(run_ranks(2, many, "ring", kv_heads, several, torch.float64), 1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_in_fp32_the_rounding_of_a_few_sums_remains(way: str) -> None:
    # Against fp64: scores of 6 products, 24 weights in each sum, merged twice, gradients of three products. Each rounds
    # by 2^-24; forty roundings that all go one way are 2.4e-6.
    found = run_ranks(2, many, way, 2, [None, [[5, 19], [9, 4, 11]]], torch.float32)
    assert_all_below(found, 40 * 2.0**-24)


def in_bf16(cp: Axis, way: str) -> list[float]:
    with torch.autocast("cpu", torch.bfloat16):
        return errors(cp, way, 2, [[5, 19], [9, 4, 11]], torch.float32)


@pytest.mark.parametrize("way", WAYS)
def test_autocast_computes_in_bf16(way: str) -> None:
    # Rounded to 8 bits: the inputs, the weights, each part and the result, twice in the backward; 2^-9 each at most.
    for found in run_ranks(2, in_bf16, way):
        assert max(found) < 8 * 2.0**-8
        assert found[0] > 1e-4, "it computed in fp32"


def repeated(cp: Axis) -> bool:
    """Say whether ring attention gives bitwise the same twice."""
    torch.manual_seed(cp.rank)
    q, k, v = (torch.randn(S // cp.size, B, heads, D) for heads in (N, 2, 2))
    return torch.equal(ring_attention(q, k, v, cp), ring_attention(q, k, v, cp))


def test_the_same_layout_twice_is_bitwise_the_same() -> None:
    assert run_ranks(2, repeated) == [True, True]


def test_wrong_shapes_name_the_rule() -> None:
    cp = Axis("cp", 3, 1)
    q, k = torch.zeros(5, B, 4, D), torch.zeros(5, B, 2, D)
    with pytest.raises(ValueError, match=r"5 positions on a rank are not two chunks; .* 2 \* cp = 6"):
        ring_attention(q, k, k, cp)
    with pytest.raises(ValueError, match=r"document has shape \[4, 2\]; .* \[12, 2\]"):
        ring_attention(q[:4], k[:4], k[:4], cp, Documents(torch.zeros(4, B, dtype=torch.int64)))
    with pytest.raises(ValueError, match="num_heads = 4 on a rank does not divide by cp = 3"):
        ulysses_attention(q, k, k, cp)
