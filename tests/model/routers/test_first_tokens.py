"""Which tokens of a sequence rank highest: what rounding has parted is equal, and of equals the earlier are first."""

import pytest
import torch

from meshwright.model.routers.capacity import first_tokens


@pytest.mark.parametrize("far", [1e3, 1e6, torch.inf, -1e6, -torch.inf])
def test_a_ranking_that_lies_far_out_moves_no_other(far: float) -> None:
    ranking = torch.randn(1024, 1, generator=torch.Generator().manual_seed(0))
    ranking[0] = far
    found = first_tokens(ranking, torch.ones(1024, 1, dtype=torch.bool), torch.tensor([128]))[:, 0]
    highest = torch.zeros(1024, dtype=torch.bool)
    highest[ranking[:, 0].topk(128).indices] = True
    # One of the two at the edge of the 128 may fall on the other's level.
    assert int((found != highest).sum()) <= 2


def test_a_sequence_of_few_or_no_counted_tokens() -> None:
    ranking, counted = torch.tensor([[3.0, 1.0], [2.0, 5.0]]), torch.tensor([[False, False], [True, False]])
    assert first_tokens(ranking, counted, torch.tensor([1, 1])).T.tolist() == [[False, True], [False, False]]


def test_of_equal_tokens_the_earlier_are_first_and_padding_never_is() -> None:
    ranking, counted = torch.zeros(5, 2), torch.ones(5, 2, dtype=torch.bool)
    counted[0, 1] = counted[3, 1] = False
    first = first_tokens(ranking, counted, torch.tensor([2, 4]))
    assert first.T.tolist() == [[True, True, False, False, False], [False, True, True, False, True]]


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.0), (torch.float32, 1e-30), (torch.float64, 1e6)])
def test_what_rounding_has_parted_is_equal_and_what_differs_is_not(dtype: torch.dtype, scale: float) -> None:
    # Three of eight tokens are equal but for a few units in the last place; the others lie a hundredth apart.
    generator = torch.Generator().manual_seed(0)
    plain = torch.tensor([0.3, 0.1, 0.3, 0.31, 0.2, 0.3, 0.32, 0.0], dtype=dtype)
    for _ in range(20):
        noise = torch.randint(-4, 5, (8,), generator=generator) * torch.finfo(dtype).eps
        ranking, counted = ((plain * (1 + noise)) * scale)[:, None], torch.ones(8, 1, dtype=torch.bool)
        found = {n: first_tokens(ranking, counted, torch.tensor([n]))[:, 0].nonzero()[:, 0].tolist() for n in (2, 3, 4)}
        assert found == {2: [3, 6], 3: [0, 3, 6], 4: [0, 2, 3, 6]}
        alike = ((0.3 * scale) * (1 + noise)).to(dtype)[:, None]
        assert first_tokens(alike, counted, torch.tensor([3]))[:, 0].tolist() == [True] * 3 + [False] * 5
