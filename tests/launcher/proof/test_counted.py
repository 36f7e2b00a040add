"""Counted tokens: the same for whoever asks, with documents that end within samples, and targets left out unevenly."""

import numpy as np
import pytest

from meshwright.data.batches import Batches, fetch
from meshwright.data.order import SampleOrder
from meshwright.kernels.matmul.cross_entropy import NOT_COUNTED
from meshwright.launcher.proof.counted import counted_store

SEQ = 32


def test_a_token_is_a_function_of_its_place() -> None:
    split = counted_store(SEQ, 64, 0).splits["train"]
    whole, documents = split.read(0, 500), split.documents_of(0, 500)
    assert np.array_equal(split.read(123, 50), whole[123:173])
    assert np.array_equal(split.documents_of(123, 50), documents[123:173])
    assert len(set(whole.tolist())) > 50


def test_ids_fit_the_vocabulary_and_a_few_are_never_seen() -> None:
    store = counted_store(SEQ, 61, 0)
    tokens = store.splits["train"].read(0, 2000)
    assert store.vocab_size < 61
    assert set(tokens.tolist()) - {NOT_COUNTED} <= set(range(store.vocab_size))


def test_samples_hold_several_documents_and_count_different_numbers_of_targets() -> None:
    split = counted_store(SEQ, 64, 0).splits["train"]
    batch = fetch(split, SampleOrder(split.num_tokens, SEQ, seed=0), range(12))
    counted = (batch.tokens[:, 1:] >= 0).sum(1)
    assert all(len(set(row)) >= 2 for row in batch.document.tolist())
    assert [sample for sample in range(12) if counted[sample] == 0] == [3, 6, 7, 11]
    assert len(set(counted.tolist())) > 3


@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 32])
@pytest.mark.parametrize("fewest", [2, 3, 4, 6])
def test_no_step_is_left_without_a_target(seq_len: int, fewest: int) -> None:
    split = counted_store(seq_len, 64, 0, fewest=fewest, samples=fewest * 60).splits["train"]
    batch = fetch(split, SampleOrder(split.num_tokens, seq_len, seed=0), range(fewest * 60))
    counted = (batch.tokens[:, 1:] >= 0).sum(1).reshape(60, fewest)
    assert counted.sum(1).min() > 0


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_whole_micro_batches_are_without_a_target(micro_batch: int) -> None:
    split = counted_store(SEQ, 64, 0).splits["train"]
    batch = fetch(split, SampleOrder(split.num_tokens, SEQ, seed=0), range(16))
    counted = (batch.tokens[:, 1:] >= 0).sum(1).reshape(-1, micro_batch)
    assert (counted.sum(1) == 0).sum() >= 2


def test_the_loader_of_a_run_reads_it() -> None:
    split = counted_store(SEQ, 64, 0).splits["train"]
    order = SampleOrder(split.num_tokens, SEQ, seed=0)
    both = [next(Batches(split, order, 0, lambda _: 4, rank, 2, prefetch=0)) for rank in range(2)]
    alone = next(Batches(split, order, 0, lambda _: 4, prefetch=0))
    assert np.array_equal(np.concatenate([batch.tokens for batch in both]), alone.tokens)
