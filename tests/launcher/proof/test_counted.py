"""Counted tokens: the same for whoever asks, with documents that end within samples, and targets left out unevenly."""

import numpy as np

from meshwright.data.batches import Batches, fetch
from meshwright.data.order import SampleOrder
from meshwright.kernels.cross_entropy import NOT_COUNTED
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
    assert [sample for sample in range(12) if counted[sample] == 0] == [3, 7, 11]
    assert len(set(counted.tolist())) > 3


def test_the_loader_of_a_run_reads_it() -> None:
    split = counted_store(SEQ, 64, 0).splits["train"]
    order = SampleOrder(split.num_tokens, SEQ, seed=0)
    both = [next(Batches(split, order, 0, lambda _: 4, rank, 2, prefetch=0)) for rank in range(2)]
    alone = next(Batches(split, order, 0, lambda _: 4, prefetch=0))
    assert np.array_equal(np.concatenate([batch.tokens for batch in both]), alone.tokens)
