"""The zigzag order: every position once, the same work for every rank, and what need not meet is found by document."""

import pytest
import torch

from meshwright.parallel.context.order import (
    meetings,
    pairs,
    positions_to_ranks,
    ranks_to_positions,
    zigzag_part,
    zigzag_positions,
)
from meshwright.parallel.mesh import Axis


def axis(size: int, rank: int) -> Axis:
    return Axis("cp", size, rank)


def test_a_rank_holds_a_chunk_from_each_end() -> None:
    held = [zigzag_positions(16, axis(4, rank)).tolist() for rank in range(4)]
    assert held == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]


def test_one_rank_holds_all_positions_of_any_number() -> None:
    assert zigzag_positions(7, axis(1, 0)).tolist() == list(range(7))


def test_chunks_that_do_not_divide_the_sequence_are_refused() -> None:
    with pytest.raises(ValueError, match=r"seq_len = 12 does not divide by 2 \* cp = 8"):
        zigzag_positions(12, axis(4, 0))


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_parts_put_together_stand_in_the_order_of_positions(cp: int) -> None:
    whole = torch.randn(12 * cp, 3)
    by_rank = torch.cat([zigzag_part(whole, axis(cp, rank)) for rank in range(cp)])
    assert torch.equal(ranks_to_positions(by_rank, axis(cp, 0)), whole)
    assert torch.equal(positions_to_ranks(whole, axis(cp, 0)), by_rank)


def seen_by_pairs(cp: int, rank: int, s: int, document: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """Return what a rank's queries see of all positions when they go by the pairs, and how many scores that takes."""
    mine, seen, scores = zigzag_positions(s, axis(cp, rank)), torch.zeros(s // cp, s, dtype=torch.bool), 0
    meet = None if document is None else meetings(document[:, None], axis(cp, rank))
    for source in range(cp):
        theirs = zigzag_positions(s, axis(cp, source))
        for pair in pairs(rank, source, cp, s // cp, meet):
            queries, keys = mine[pair.queries], theirs[pair.keys]
            part = torch.ones(len(queries), len(keys), dtype=torch.bool)
            part = part.tril() if pair.is_causal else part
            scores += int(part.sum())
            if pair.by_document and document is not None:
                part = part & (document[queries][:, None] == document[keys])
            assert not seen[pair.queries][:, theirs[pair.keys]].any(), "a key met twice"
            rows = torch.arange(s // cp)[pair.queries]
            seen[rows[:, None], keys] = part
    return seen, scores


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_pairs_are_the_causal_mask_and_the_same_work_for_every_rank(cp: int) -> None:
    s = 4 * cp
    causal = torch.ones(s, s, dtype=torch.bool).tril()
    work = set()
    for rank in range(cp):
        seen, scores = seen_by_pairs(cp, rank, s, None)
        assert torch.equal(seen, causal[zigzag_positions(s, axis(cp, rank))])
        work.add(scores)
    assert len(work) == 1


@pytest.mark.parametrize("lengths", [[16], [2] * 8, [1] * 16, [4, 12], [3, 1, 7, 5], [15, 1]])
def test_pairs_by_document_are_the_mask_and_leave_out_what_does_not_meet(lengths: list[int]) -> None:
    s, cp = 16, 4
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = torch.ones(s, s, dtype=torch.bool).tril() & (document[:, None] == document)
    for rank in range(cp):
        mine = zigzag_positions(s, axis(cp, rank))
        seen, scores = seen_by_pairs(cp, rank, s, document)
        assert torch.equal(seen, mask[mine])
        # No chunk pair is computed in which nothing is seen, and none that could do without a mask has one.
        meeting = [mask[q : q + 2, k : k + 2] for q in mine[::2].tolist() for k in range(0, q + 1, 2)]
        causal = [3 if q == k else 4 for q in mine[::2].tolist() for k in range(0, q + 1, 2)]
        assert scores == sum(size for part, size in zip(meeting, causal, strict=True) if part.any())


def test_chunks_within_one_document_need_no_mask() -> None:
    document = torch.tensor([[0, 5]] * 6 + [[1, 5]] * 2)  # the second sample is one document
    found = meetings(document, axis(2, 0))
    assert found[2][:3] == ("all", "all", "all")
    assert found[3][0] == "some"
    assert meetings(document[:, :1], axis(2, 0))[3][:4] == ("none", "none", "none", "all")
