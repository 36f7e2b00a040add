"""The order of samples is a pure function of the seed and the sample's index."""

from collections import Counter
from itertools import pairwise

import pytest

from meshwright.data.order import SampleOrder


@pytest.mark.parametrize("num_windows", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000])
def test_each_epoch_is_a_permutation_of_all_windows(num_windows: int) -> None:
    order = SampleOrder(num_windows * 8 + 1, seq_len=8, seed=5)
    assert order.samples_per_epoch == num_windows
    everything = [8 * window for window in range(num_windows)]
    for epoch in range(3):
        first = epoch * num_windows
        assert sorted(order.window(first + place) for place in range(num_windows)) == everything


def test_every_window_lies_within_the_split_whatever_is_left_over() -> None:
    for num_tokens in range(9, 40):
        order = SampleOrder(num_tokens, seq_len=8, seed=0)
        last = max(order.window(sample) for sample in range(order.samples_per_epoch))
        assert last + 8 < num_tokens <= last + 8 + 8


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch_of(seed: int, epoch: int) -> tuple[int, ...]:
        order = SampleOrder(1001, seq_len=10, seed=seed)
        return tuple(order.window(epoch * 100 + place) for place in range(100))

    assert len({epoch_of(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


def test_the_order_is_the_one_that_is_documented() -> None:
    """Pinned: another order would make a resumed run see other samples than an unbroken one."""
    order = SampleOrder(1001, seq_len=10, seed=1)
    assert [order.window(sample) for sample in (0, 1, 2, 99, 100, 10**12)] == PINNED


def test_every_window_comes_first_about_equally_often() -> None:
    seeds = 4000
    first = Counter(SampleOrder(10 * 4 + 1, seq_len=4, seed=seed).window(0) // 4 for seed in range(seeds))
    assert set(first) == set(range(10))
    assert all(abs(count - seeds / 10) < 5 * (seeds / 10) ** 0.5 for count in first.values())


def test_neighbours_in_the_order_are_no_neighbours_in_the_text() -> None:
    order = SampleOrder(4001, seq_len=1, seed=0)
    row = [order.window(sample) for sample in range(4000)]
    steps = Counter(after - before for before, after in pairwise(row))
    assert steps.most_common(1)[0][1] < 8  # a rotation or a stride would show as one step that is common


def test_a_split_too_short_for_one_window_is_refused_with_the_numbers() -> None:
    SampleOrder(9, seq_len=8, seed=0)
    with pytest.raises(ValueError, match=r"seq_len = 8: one sample needs 9 tokens, the split has 8"):
        SampleOrder(8, seq_len=8, seed=0)


PINNED = [730, 800, 300, 320, 300, 840]
