"""Batches: whatever the ranks, the batch size and the read-ahead, step by step the same samples."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from meshwright.data.batches import Batch, Batches, fetch
from meshwright.data.errors import StoreError
from meshwright.data.order import SampleOrder
from meshwright.data.store import Split, TokenStore

SEQ_LEN = 16


@pytest.fixture(scope="module")
def split(prepared: Path) -> Split:
    return TokenStore.open(prepared).splits["train"]


@pytest.fixture(scope="module")
def order(split: Split) -> SampleOrder:
    return SampleOrder(split.num_tokens, SEQ_LEN, seed=3)


def take(batches: Batches, count: int) -> list[Batch]:
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def samples_of(batches: list[Batch]) -> list[int]:
    return [sample for batch in batches for sample in batch.sample.tolist()]


def test_a_batch_holds_the_tokens_documents_and_indices_of_its_samples(split: Split, order: SampleOrder) -> None:
    batch = fetch(split, order, range(5, 9))
    assert batch.tokens.shape == batch.document.shape == (4, SEQ_LEN + 1)
    assert batch.tokens.dtype == batch.document.dtype == batch.sample.dtype == np.int64
    assert batch.sample.tolist() == [5, 6, 7, 8]
    everything, documents = split.read(0, split.num_tokens), split.documents_of(0, split.num_tokens)
    for row, sample in enumerate(range(5, 9)):
        start = order.window(sample)
        np.testing.assert_array_equal(batch.tokens[row], everything[start : start + SEQ_LEN + 1])
        np.testing.assert_array_equal(batch.document[row], documents[start : start + SEQ_LEN + 1])


def test_a_long_document_goes_on_in_the_next_sample_and_every_token_is_a_target_once(
    split: Split, order: SampleOrder
) -> None:
    epoch = fetch(split, order, range(order.samples_per_epoch))
    starts = np.array([order.window(sample) for sample in epoch.sample])
    in_text_order = epoch.tokens[np.argsort(starts)]
    np.testing.assert_array_equal(in_text_order[:-1, -1], in_text_order[1:, 0])  # last target, next first input
    targets = in_text_order[:, 1:].reshape(-1)
    np.testing.assert_array_equal(targets, split.read(1, order.samples_per_epoch * SEQ_LEN))
    longest = np.bincount(epoch.document[:, 1:].reshape(-1)).max()
    assert longest > 3 * SEQ_LEN  # or this shows nothing


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_ranks_parts_tile_the_global_batch(split: Split, order: SampleOrder, num_ranks: int, prefetch: int) -> None:
    parts = [
        take(
            Batches(
                split,
                order,
                first_sample=7,
                batch_size_at=lambda _: 12,
                rank=rank,
                num_ranks=num_ranks,
                prefetch=prefetch,
            ),
            3,
        )
        for rank in range(num_ranks)
    ]
    for step in range(3):
        whole = fetch(split, order, range(7 + 12 * step, 7 + 12 * (step + 1)))
        for name in ("tokens", "document", "sample"):
            joined = np.concatenate([getattr(part[step], name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name))


def test_a_position_means_the_same_whatever_the_batch_size_and_ranks_before(split: Split, order: SampleOrder) -> None:
    small = Batches(split, order, first_sample=0, batch_size_at=lambda _: 4, prefetch=2)
    for _ in range(6):
        next(small)
    state = small.state_dict()
    small.close()
    assert state == {"samples": 24}
    large = Batches(split, order, first_sample=0, batch_size_at=lambda _: 12, rank=1, num_ranks=2, prefetch=2)
    next(large)
    large.load_state_dict(state)
    assert samples_of(take(large, 2)) == [*range(30, 36), *range(42, 48)]


def test_the_position_counts_what_was_handed_out_and_not_what_was_read_ahead(split: Split, order: SampleOrder) -> None:
    asked: list[int] = []

    def batch_size_at(position: int) -> int:
        asked.append(position)
        return 4

    batches = Batches(split, order, first_sample=0, batch_size_at=batch_size_at, prefetch=3)
    next(batches)
    deadline = time.monotonic() + 10
    while len(asked) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(asked) >= 5  # the thread is ahead
    assert batches.state_dict() == {"samples": 4}
    batches.close()


def test_a_batch_size_that_grows_uses_every_sample_once(split: Split, order: SampleOrder) -> None:
    batches = Batches(split, order, first_sample=0, batch_size_at=lambda consumed: 2 if consumed < 6 else 4, prefetch=2)
    taken = take(batches, 5)
    assert [len(batch.sample) for batch in taken] == [2, 2, 2, 4, 4]
    assert samples_of(taken) == list(range(14))


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused(split: Split, order: SampleOrder) -> None:
    batches = Batches(split, order, first_sample=0, batch_size_at=lambda _: 5, rank=0, num_ranks=2, prefetch=1)
    with pytest.raises(ValueError, match="5 samples at sample 0 does not divide by 2 ranks"):
        next(batches)
    batches.close()
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        Batches(split, order, first_sample=0, batch_size_at=lambda _: 4, rank=2, num_ranks=2)


def test_damage_met_by_the_thread_is_raised_at_next_when_its_batch_is_due(
    store_copy: Path, flip_byte: Callable[[Path, int], None]
) -> None:
    flip_byte(store_copy / "train" / "tokens" / "c" / "0", 100)
    split = TokenStore.open(store_copy).splits["train"]
    order = SampleOrder(split.num_tokens, SEQ_LEN, seed=3)
    batches = Batches(split, order, first_sample=0, batch_size_at=lambda _: 4, prefetch=2)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"train/tokens/c/0 is damaged: chunk 0"):
            next(batches)
    assert batches.state_dict() == {"samples": 0}
    batches.close()


def test_closing_ends_the_thread_and_dropping_does_too(split: Split, order: SampleOrder) -> None:
    closed = Batches(split, order, first_sample=0, batch_size_at=lambda _: 4, prefetch=1)
    next(closed)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        next(closed)
    dropped = Batches(split, order, first_sample=0, batch_size_at=lambda _: 4, prefetch=1)
    next(dropped)
    del dropped
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(thread.name == "batches" for thread in threading.enumerate()):
        time.sleep(0.02)
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]
