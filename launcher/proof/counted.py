"""A store whose tokens are counted, not read: what the proof trains on where there is no store.

Token i of the endless row is a function of i alone, so every layout reads the same. Documents are 5, 9, 13 and 6
tokens long, over and over, so that a window holds several and ends within one. Some targets are left out, and these
samples have none at all, so that ranks count different numbers of tokens, and a micro-batch, or a rank, may have none:

    sample                   0 1 2 3 4 5 6 7 8 9 ...
    micro-batches of two     ___ ___ ___ ___ ___
    without a target               x     x x           where a step has more than two samples; else only the x at 3, 7
"""

from pathlib import Path

import numpy as np
from jaxtyping import Int64

from meshwright.data.meta import SplitMeta, StoreMeta, TokenizerMeta
from meshwright.data.order import SampleOrder
from meshwright.data.store import Origin, Split, TokenStore
from meshwright.kernels.matmul.cross_entropy import NOT_COUNTED

_DOCUMENTS = np.cumsum([0, 5, 9, 13, 6])
_PERIOD = int(_DOCUMENTS[-1])
_LEFT_OUT = 7  # every seventh token, roughly, is no target
_SHORTEST = 8  # tokens of a sample in which some are left out: a shorter one could be left without any
_EMPTY, _FEW_EMPTY = (3, 6, 7), (3, 7)  # of eight samples
_FEW = 2  # samples of a step of which two neighbours would be all


class CountedSplit(Split):
    """A split whose tokens come from arithmetic."""

    def __init__(self, name: str, num_tokens: int, order: SampleOrder, num_ids: int, fewest: int) -> None:
        """Take the length of the row, the order of its windows, how many ids there are, and a step's fewest samples."""
        self.name, self.num_tokens = name, num_tokens
        self.num_documents = num_tokens // _PERIOD * (len(_DOCUMENTS) - 1)
        self._seq_len, self._num_ids = order.seq_len, num_ids
        empty = _EMPTY if fewest > _FEW else _FEW_EMPTY
        self._is_empty = np.zeros(order.samples_per_epoch + 1, bool)  # the last is of the token before all windows
        for sample in range(order.samples_per_epoch):
            self._is_empty[order.window(sample) // order.seq_len] = sample % 8 in empty

    def read(self, start: int, length: int) -> Int64[np.ndarray, "length"]:
        """Return tokens from a position on; what is not counted as a target has the id that says so."""
        at = np.arange(start, start + length, dtype=np.uint64)
        mixed = at * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        tokens = (mixed % np.uint64(self._num_ids)).astype(np.int64)
        # The target of a window's token i is token i + 1, so that windows share the token between them.
        window = (at.astype(np.int64) - 1) // self._seq_len
        left_out = (mixed >> np.uint64(7)) % np.uint64(_LEFT_OUT) == 0
        left_out &= self._seq_len >= _SHORTEST
        tokens[left_out | self._is_empty[window]] = NOT_COUNTED
        return tokens

    def documents_of(self, start: int, length: int) -> Int64[np.ndarray, "length"]:
        """Return the number of the document that each token belongs to."""
        period, place = np.divmod(np.arange(start, start + length), _PERIOD)
        within = np.searchsorted(_DOCUMENTS, place, side="right") - 1
        return (period * (len(_DOCUMENTS) - 1) + within).astype(np.int64)

    def origin(self, document: int) -> Origin:
        """Say that a document came from no file."""
        return Origin("counted tokens", "document", document)


class CountedStore(TokenStore):
    """A store that lies nowhere."""

    def __init__(self, meta: StoreMeta, splits: dict[str, Split]) -> None:
        """Take the splits as they are: there are no files to open."""
        self.path, self.meta, self.splits = Path("counted"), meta, splits


def counted_store(seq_len: int, vocab_size: int, seed: int, *, fewest: int = 4, samples: int = 64) -> TokenStore:
    """Return a store for so many samples of `seq_len`, whose steps have at least `fewest` of them.

    They are of one epoch: in the next one, which has another order, some step could be left without a target. A few ids
    of the vocabulary are never seen, as in most models. What is evaluated is the other split, in the order that no seed
    changes.
    """
    num_tokens = samples * seq_len + 1
    ids = (vocab_size or 64) - 3
    splits = {"train": seed, "validation": 0}
    meta = StoreMeta(
        format="meshwright-tokens",
        version=1,
        corpus="counted",
        vocab_size=ids,
        dtype="uint16",
        tokenizer=TokenizerMeta(sha256="0" * 64, origin="counted", end_of_text="<end>", end_of_text_id=0),
        splits={name: SplitMeta(num_tokens=num_tokens, num_documents=1, arrays={}) for name in splits},
        validation_unigram_nats=None,
        sources=[],
        recipe={"seq_len": seq_len, "ids": ids},
        written_with={},
    )
    orders = {name: SampleOrder(num_tokens, seq_len, seed) for name, seed in splits.items()}
    return CountedStore(
        meta, {name: CountedSplit(name, num_tokens, order, ids, fewest) for name, order in orders.items()}
    )
