"""A token store: token ids and the documents they belong to, in a train and a validation split.

    store/  meta.json  tokenizer.json  zarr.json
            train/       tokens           [num_tokens]         uint16 or uint32
                         document_starts  [num_documents + 1]  first token of each document, then num_tokens
                         document_source  [num_documents]      which of meta.json's sources it came from
                         document_index   [num_documents]      which document, line, paragraph or row of that source
            validation/  the same

Each name is a zarr v3 array. A document is its text's tokens and then the end-of-text token, so that
none is empty. Opening a store reads metadata only: it takes milliseconds whatever the store's size.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt

from meshwright.data.errors import StoreError
from meshwright.data.fast_read import ShardedArray
from meshwright.data.meta import REPAIR, SourceMeta, SplitMeta, StoreMeta

ARRAYS = ("tokens", "document_starts", "document_source", "document_index")


@dataclass(frozen=True)
class Origin:
    """Where a document came from: `index` counts from 0 the units (lines, rows, ...) of the file `path`."""

    path: str
    unit: str
    index: int

    def __str__(self) -> str:
        """Name the document for a person: 'a.jsonl, line 17'; lines and the like count from 1 here."""
        return self.path if self.unit == "document" else f"{self.path}, {self.unit} {self.index + 1}"


class Split:
    """One split of a store: a row of tokens, cut into documents."""

    def __init__(self, folder: Path, meta: SplitMeta, sources: list[SourceMeta]) -> None:
        """Open the arrays of a split; `TokenStore` has checked that they are all there."""
        self.name = folder.name
        self.num_tokens = meta.num_tokens
        self.num_documents = meta.num_documents
        self._sources = sources
        self.arrays = {name: ShardedArray(folder / name) for name in ARRAYS}
        self._tokens = self.arrays["tokens"]
        self._starts = self.arrays["document_starts"]

    def read(self, start: int, length: int) -> UInt[np.ndarray, "length"]:
        """Return `length` tokens from position `start` on; a chunk's checksum is verified when it is first touched.

        Raises:
            StoreError: if what they lie in is missing or damaged, naming file and chunk.
        """
        return self._tokens.read(start, length)

    def documents_of(self, start: int, length: int) -> Int64[np.ndarray, "length"]:
        """Return the number of the document that each of `length` tokens from `start` on belongs to."""
        first = bisect_right(self._starts, start) - 1
        last = bisect_right(self._starts, start + length - 1, lo=first) - 1
        later_starts = self._starts.read(first + 1, last - first)
        positions = np.arange(start, start + length)
        return first + np.searchsorted(later_starts, positions, side="right").astype(np.int64)

    def document(self, number: int) -> UInt[np.ndarray, "length"]:
        """Return the tokens of one document, its end-of-text token included."""
        start, end = self._starts[number], self._starts[number + 1]
        return self.read(start, end - start)

    def origin(self, document: int) -> Origin:
        """Say which file a document came from, and where in it."""
        source = self._sources[self.arrays["document_source"][document]]
        return Origin(source.path, source.unit, self.arrays["document_index"][document])


class TokenStore:
    """A store on a local disk, opened for reading."""

    def __init__(self, path: Path, meta: StoreMeta) -> None:
        """Hold an opened store; `TokenStore.open` makes one from its folder."""
        self.path = path
        self.meta = meta
        self.splits = {name: Split(path / name, split, meta.sources) for name, split in meta.splits.items()}
        problems = [line for split in self.splits.values() for line in _misfits(split, meta)]
        if problems:
            raise StoreError(*problems)

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """Open a store: read its metadata, verify its tokenizer, and look that every shard is there in full size.

        Raises:
            StoreError: if a file is missing, cut short, changed or of another store; names all of them.
        """
        store = Path(path).expanduser()
        meta = StoreMeta.read(store)
        if problems := meta.damage(store):
            raise StoreError(*problems)
        return cls(store, meta)

    @property
    def vocab_size(self) -> int:
        """Return one more than the largest token id that the tokenizer can give."""
        return self.meta.vocab_size

    @cached_property
    def fingerprint(self) -> str:
        """Return 32 hex digits that are equal for equal tokens, documents, splits and tokenizer."""
        return self.meta.fingerprint

    def verify(self) -> None:
        """Read the whole store and check every chunk's crc32c, at about the speed of the disk.

        Raises:
            StoreError: at the first chunk that is damaged.
        """
        for split in self.splits.values():
            for array in split.arrays.values():
                array.verify()


def _misfits(split: Split, meta: StoreMeta) -> list[str]:
    """Compare each array's own metadata with what meta.json says of it."""
    problems = []
    for name, array in split.arrays.items():
        said = meta.splits[split.name].arrays[name].length
        if array.length != said:
            problems.append(f"{array.folder} has {array.length:,} elements, meta.json says {said:,}; {REPAIR}")
    if split.arrays["tokens"].dtype != np.dtype(meta.dtype):
        problems.append(f"{split.arrays['tokens'].folder} is not of {meta.dtype}, as meta.json says; {REPAIR}")
    return problems
