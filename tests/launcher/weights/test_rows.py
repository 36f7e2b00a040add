"""Foreign tensors made of ours, and read back by any rows: joined, by groups, in pairs, transposed."""

import pytest
import torch
from torch import Tensor

from meshwright.launcher.weights.rows import joined, read_ours
from meshwright.model.families.family import Row, Source, same

A, B = torch.arange(8.0).view(4, 2), 10 + torch.arange(4.0).view(2, 2)
SIX = torch.arange(12.0).view(6, 2)
SOURCES = (Source("a", (4, 2)), Source("b", (2, 2)))
E, F, H = 3, 4, 2
GATE, UP = torch.arange(24.0).view(E, F, H), 100 + torch.arange(24.0).view(E, F, H)

# Each with its sources, and what it is, worked out by hand.
CASES = {
    "the same": (same("a", "x", (4, 2)), [A], A),
    "with a dim more": (Row("x", (4, 1, 2), (Source("a", (4, 2)),)), [A], A[:, None]),
    "one behind the other": (Row("x", (6, 2), SOURCES), [A, B], torch.cat([A, B])),
    "transposed": (Row("x", (2, 6), SOURCES, is_transposed=True), [A, B], torch.cat([A, B]).T),
    "by groups": (Row("x", (6, 2), SOURCES, groups=2), [A, B], torch.cat([A[:2], B[:1], A[2:], B[1:]])),
    "biases by groups": (
        Row("x", (6,), (Source("a", (4,)), Source("b", (2,))), groups=2),
        [A[:, 0], B[:, 0]],
        torch.tensor([0.0, 2.0, 10.0, 4.0, 6.0, 12.0]),
    ),
    # Six rows and more, because of four both ways are the same.
    "in pairs": (
        Row("x", (14, 1), (Source("a", (14, 1)),), groups=2, pairs=6),
        [torch.arange(14.0).view(14, 1)],
        torch.tensor([0, 1, 4, 2, 5, 3, 6, 7, 8, 11, 9, 12, 10, 13.0]).view(14, 1),
    ),
    "pairs behind what is none": (
        Row("x", (8, 2), (SOURCES[1], Source("c", (6, 2))), pairs=6),
        [B, SIX],
        torch.cat([B, SIX[[0, 3, 1, 4, 2, 5]]]),
    ),
    "stacked experts": (
        Row("x", (E, 2 * F, H), (Source("a", (E, F, H)), Source("b", (E, F, H))), groups=E),
        [GATE, UP],
        torch.cat([GATE, UP], 1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_foreign_tensor_is_made_of_ours(name: str) -> None:
    row, parts, expected = CASES[name]
    assert torch.equal(joined(row, parts), expected)
    assert expected.shape == row.shape


@pytest.mark.parametrize("name", CASES)
def test_every_range_of_rows_reads_back(name: str) -> None:
    row, parts, theirs = CASES[name]
    for number, part in enumerate(parts):
        for first in range(len(part)):
            for end in range(first, len(part) + 1):
                read = read_ours(row, number, (first, end), reader(theirs))
                assert torch.equal(read, part[first:end]), (number, first, end)


def reader(whole: Tensor, read: list[int] | None = None):  # type: ignore[no-untyped-def]
    def slice_of(name: str, is_last_dim: bool, first: int, end: int) -> Tensor:
        assert name == "x"
        assert 0 <= first <= end <= whole.shape[-1 if is_last_dim else 0]
        if read is not None:
            read.append(end - first)
        return whole[:, first:end] if is_last_dim else whole[first:end]

    return slice_of


@pytest.mark.parametrize(
    ("name", "number", "rows", "expected"),
    [
        ("one behind the other", 1, (1, 2), 1),
        ("transposed", 0, (1, 3), 2),
        ("by groups", 1, (1, 2), 3),  # a group, not both
        ("stacked experts", 0, (1, 2), 1),  # one expert
        ("stacked experts", 1, (0, 2), 2),
    ],
)
def test_no_more_than_what_holds_the_rows_is_read(name: str, number: int, rows: tuple[int, int], expected: int) -> None:
    row, parts, theirs = CASES[name]
    read: list[int] = []
    assert torch.equal(read_ours(row, number, rows, reader(theirs, read)), parts[number][slice(*rows)])
    assert read == [expected]
