"""Writing a split's arrays as sharded zarr v3, by zarr itself, without knowing their length beforehand.

Elements are collected until a shard is full and then written as one file; a short array gets one short
shard. `fast_read.py` shows the layout and reads it back.
"""

from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zarr
from jaxtyping import Int64, Integer, UInt
from zarr.codecs import Crc32cCodec

from meshwright.data.meta import ArrayMeta, SplitMeta

CHUNK_LENGTH = 1 << 15  # 64 KiB of uint16: what a first touch must read to check it
SHARD_CHUNKS = 1 << 9  # 16 Mi tokens, 32 MiB of uint16 in a file


class ArrayWriter:
    """Appends to one array."""

    def __init__(
        self, group: Any, name: str, dtype: str, *, chunk_length: int = CHUNK_LENGTH, shard_chunks: int = SHARD_CHUNKS
    ) -> None:
        """Take the zarr group to write into; nothing is written before a shard is full."""
        self._group = group
        self._name = name
        self._dtype = np.dtype(dtype)
        self._chunk_length = chunk_length
        self._shard_length = chunk_length * shard_chunks
        self._pending: list[Integer[np.ndarray, "n"]] = []
        self._num_pending = 0
        self._length = 0
        self._array: Any = None
        self._hash = xxhash.xxh3_128()

    def append(self, values: Integer[np.ndarray, "n"]) -> None:
        """Add elements at the end."""
        values = values.astype(self._dtype)
        self._hash.update(values.tobytes())
        self._pending.append(values)
        self._num_pending += len(values)
        while self._num_pending >= self._shard_length:
            row = np.concatenate(self._pending)
            self._write(row[: self._shard_length])
            self._pending = [row[self._shard_length :]]
            self._num_pending -= self._shard_length

    def close(self) -> ArrayMeta:
        """Write what is left, and describe the whole array."""
        rest = np.concatenate([np.empty(0, self._dtype), *self._pending])
        if len(rest) > 0 or self._array is None:
            self._write(rest)
        folder = Path(self._group.store.root, self._group.path, self._name)
        num_shards = -(-self._length // self._shard_length)
        sizes = [(folder / "c" / str(shard)).stat().st_size for shard in range(num_shards)]
        return ArrayMeta(length=self._length, shards=sizes, xxh3_128=self._hash.hexdigest())

    def _write(self, row: Integer[np.ndarray, "n"]) -> None:
        if self._array is None:
            # An array that ends within its first shard gets a shard, and if need be a chunk, of its own length.
            chunk_length = min(self._chunk_length, max(1, len(row)))
            num_chunks = max(1, -(-len(row) // chunk_length))
            self._array = self._group.create_array(
                self._name,
                shape=(0,),
                dtype=self._dtype,
                chunks=(chunk_length,),
                shards=(num_chunks * chunk_length,),
                filters=None,
                compressors=[Crc32cCodec()],
                fill_value=0,
                # A chunk that holds only the fill value is written too: a missing shard is then always an error.
                config={"write_empty_chunks": True},
            )
        start = self._length
        self._length += len(row)
        self._array.resize((self._length,))
        self._array[start:] = row


class SplitWriter:
    """Appends documents to one split, and counts its tokens."""

    def __init__(self, root: Any, name: str, *, dtype: str, vocab_size: int) -> None:
        """Make the split's group under `root`."""
        group = root.create_group(name)
        self.counts: Int64[np.ndarray, "v"] = np.zeros(vocab_size, np.int64)
        self.num_tokens = 0
        self.num_documents = 0
        self._arrays = {
            "tokens": ArrayWriter(group, "tokens", dtype),
            "document_starts": ArrayWriter(group, "document_starts", "int64"),
            "document_source": ArrayWriter(group, "document_source", "int32"),
            "document_index": ArrayWriter(group, "document_index", "int64"),
        }

    def append(
        self,
        ids: UInt[np.ndarray, "tokens"],
        lengths: Int64[np.ndarray, "documents"],
        source: Int64[np.ndarray, "documents"],
        index: Int64[np.ndarray, "documents"],
    ) -> None:
        """Add documents: their tokens in a row, how many each has, and where each came from."""
        ends = self.num_tokens + np.cumsum(lengths)
        self._arrays["tokens"].append(ids)
        self._arrays["document_starts"].append(ends - lengths)
        self._arrays["document_source"].append(source)
        self._arrays["document_index"].append(index)
        self.counts += np.bincount(ids, minlength=len(self.counts))
        self.num_tokens += len(ids)
        self.num_documents += len(lengths)

    def close(self) -> SplitMeta:
        """Write what is left, and describe the split."""
        self._arrays["document_starts"].append(np.array([self.num_tokens]))
        arrays = {name: array.close() for name, array in self._arrays.items()}
        return SplitMeta(num_tokens=self.num_tokens, num_documents=self.num_documents, arrays=arrays)


def open_group(folder: Path) -> Any:
    """Make a zarr group in an empty folder."""
    return zarr.create_group(str(folder))


def unigram_nats(train: Int64[np.ndarray, "v"], validation: Int64[np.ndarray, "v"]) -> float:
    """Return the mean -ln p(token) of the validation counts, p being the add-one smoothed share in the train counts."""
    shares = (train + 1) / (train.sum() + len(train))
    return float(-(validation * np.log(shares)).sum() / validation.sum())
