"""Reading a one-dimensional sharded zarr v3 array from local disks at the speed of a memory map.

The array is cut into chunks of C elements, each N = C * itemsize bytes and then its crc32c. A shard file
holds up to S chunks, and ends with the index that says where each one lies:

    shard c/2   | chunk | crc | chunk | crc | ... | offset, size | offset, size | ...  | crc |
                  N       4     N       4           S pairs of u64, little-endian         4

    element i   chunk i // C of the array, i.e. chunk (i // C) % S of shard i // (C * S)

An index entry of all ones is a chunk that was never written: it reads as the fill value. The index is
verified when a shard is mapped, a chunk when it is first touched; both once in a process. The tests hold
this file to zarr itself; it knows nothing of tokens.
"""

import json
import mmap
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Integer, UInt64

from meshwright.data.errors import StoreError
from meshwright.data.meta import REPAIR

ABSENT = 2**64 - 1
CRC_BYTES = 4
DTYPES = ("uint16", "uint32", "int32", "int64")
SHARDS_OPEN = 128  # a map holds a file descriptor until it is dropped; the usual limit for a process is 1024


class ShardedArray:
    """A zarr v3 array on disk that reads as one long row of integers."""

    def __init__(self, folder: Path) -> None:
        """Read the array's zarr.json; no shard is opened yet.

        Raises:
            StoreError: if there is no array, or one that is not laid out as above.
        """
        self.folder = folder
        content = _read_array_json(folder)
        layout = _Layout(folder / "zarr.json", content)
        self.length: int = layout.length
        self.dtype = layout.dtype
        self.chunk_length = layout.chunk_length
        self.chunks_per_shard = layout.chunks_per_shard
        self.num_shards = -(-self.length // (self.chunk_length * self.chunks_per_shard))
        self._layout = layout
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._verified: dict[int, bytearray] = {}
        self._lock = Lock()  # a prefetching thread and an evaluation may read the same array

    def __len__(self) -> int:
        """Return the number of elements."""
        return self.length

    def __getitem__(self, index: int) -> int:
        """Return one element, so that `bisect` can search an array that is never loaded whole."""
        if not 0 <= index < self.length:
            raise IndexError(f"element {index} of {self.length} in {self.folder}")
        return int(self._chunk(index // self.chunk_length)[index % self.chunk_length])

    def read(self, start: int, length: int) -> Integer[np.ndarray, "length"]:
        """Return a copy of `length` elements from `start` on.

        Raises:
            ValueError: if they are not all within the array.
            StoreError: if a shard or chunk that they lie in is missing or damaged.
        """
        if start < 0 or length < 0 or start + length > self.length:
            raise ValueError(
                f"{self.folder} has {self.length:,} elements, {start:,} to {start + length:,} were asked for"
            )
        out = np.empty(length, self.dtype)
        done = 0
        while done < length:
            chunk, at = divmod(start + done, self.chunk_length)
            piece = self._chunk(chunk)[at : at + length - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
        return out

    def verify(self) -> None:
        """Read every chunk and check its crc32c.

        Raises:
            StoreError: at the first one that is damaged.
        """
        for chunk in range(-(-self.length // self.chunk_length)):
            self._chunk(chunk)

    def shard_path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"c{self._layout.separator}{shard}"

    def _chunk(self, chunk: int) -> Integer[np.ndarray, "length"]:
        """Return one chunk, verified; a view of the map, so that it must not outlive the call that asked for it."""
        number, inner = divmod(chunk, self.chunks_per_shard)
        with self._lock:
            shard = self._open.get(number) or self._map(number)
            self._open.move_to_end(number)
        offset = shard.offsets[inner]
        if offset == ABSENT:
            return np.full(self.chunk_length, self._layout.fill_value, self.dtype)
        if not shard.verified[inner]:
            self._check_crc(shard, number, inner)
        return np.frombuffer(shard.bytes, self.dtype, self.chunk_length, offset)

    def _map(self, number: int) -> "_Shard":
        verified = self._verified.setdefault(number, bytearray(self.chunks_per_shard))
        shard = _Shard(self.shard_path(number), self._layout, verified)
        self._open[number] = shard
        while len(self._open) > SHARDS_OPEN:
            self._open.popitem(last=False)
        return shard

    def _check_crc(self, shard: "_Shard", number: int, inner: int) -> None:
        offset = shard.offsets[inner]
        end = offset + self._layout.chunk_bytes
        stored = int.from_bytes(shard.bytes[end : end + CRC_BYTES], "little")
        found = google_crc32c.value(shard.bytes[offset:end])
        if found != stored:
            first = (number * self.chunks_per_shard + inner) * self.chunk_length
            last = min(first + self.chunk_length, self.length) - 1
            raise StoreError(
                f"{shard.path} is damaged: chunk {inner} (elements {first:,} to {last:,}, bytes {offset} to {end}) "
                f"has crc32c {found:08x}, written was {stored:08x}; {REPAIR}"
            )
        shard.verified[inner] = 1


class _Layout:
    """What zarr.json says; refuses what this reader does not read, so that it never reads it wrongly."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        try:
            (self.length,) = content["shape"]
            (shard_length,) = content["chunk_grid"]["configuration"]["chunk_shape"]
            (sharding,) = content["codecs"]
            (self.chunk_length,) = sharding["configuration"]["chunk_shape"]
            codecs = [_codec(it) for it in sharding["configuration"]["codecs"]]
            index_codecs = [_codec(it) for it in sharding["configuration"]["index_codecs"]]
            self.index_at_end = sharding["configuration"].get("index_location", "end") == "end"
            encoding = content["chunk_key_encoding"]
            self.separator = encoding.get("configuration", {}).get("separator", "/")
            self.fill_value = int(content["fill_value"])
            dtype = content["data_type"]
            kinds = (content["zarr_format"], content["chunk_grid"]["name"], sharding["name"], encoding["name"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{path} is not the metadata of a one-dimensional sharded zarr v3 array ({error!r}); {REPAIR}"
            ) from None
        little = ["bytes little", "crc32c"]
        wanted = (3, "regular", "sharding_indexed", "default")
        if kinds != wanted or codecs != little or index_codecs != little or dtype not in DTYPES:
            raise StoreError(
                f"{path}: read are arrays of {', '.join(DTYPES)} in regular shards (sharding_indexed) whose chunks and "
                f"index are coded as {little}; this one has {dtype}, {kinds}, chunks {codecs}, index {index_codecs}"
            )
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.chunks_per_shard = shard_length // self.chunk_length
        self.chunk_bytes = self.chunk_length * self.dtype.itemsize
        self.index_bytes = self.chunks_per_shard * 16 + CRC_BYTES


class _Shard:
    """One mapped shard file with its verified index."""

    def __init__(self, path: Path, layout: _Layout, verified: bytearray) -> None:
        self.path = path
        self.verified = verified
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if size < layout.index_bytes:
                    raise StoreError(
                        f"{path} is cut short: {size} bytes, its index alone has {layout.index_bytes}; {REPAIR}"
                    )
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing; {REPAIR}") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error}; {REPAIR}") from None
        self.offsets: list[int] = self._read_index(layout).tolist()

    def _read_index(self, layout: _Layout) -> UInt64[np.ndarray, "chunks"]:
        at = len(self.bytes) - layout.index_bytes if layout.index_at_end else 0
        index = self.bytes[at : at + layout.index_bytes]
        if google_crc32c.value(index[:-CRC_BYTES]) != int.from_bytes(index[-CRC_BYTES:], "little"):
            raise StoreError(
                f"{self.path} is damaged or cut short: the crc32c of its chunk index ({layout.index_bytes} bytes at "
                f"{at}) does not fit; {REPAIR}"
            )
        entries = np.frombuffer(index[:-CRC_BYTES], "<u8").reshape(-1, 2)
        offsets, sizes = entries[:, 0], entries[:, 1]
        chunk_bytes = layout.chunk_bytes + CRC_BYTES
        fits = (sizes == chunk_bytes) & (offsets <= max(0, len(self.bytes) - chunk_bytes))
        if not np.all(fits | (offsets == ABSENT)):
            raise StoreError(
                f"{self.path}: its index names chunks that are not {chunk_bytes} bytes within the file's "
                f"{len(self.bytes)}; it does not belong to this array; {REPAIR}"
            )
        return offsets


def _read_array_json(folder: Path) -> dict[str, Any]:
    path = folder / "zarr.json"
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path} is missing; {REPAIR}") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; {REPAIR}") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: not JSON ({error}); {REPAIR}") from None
    if not isinstance(content, dict):
        raise StoreError(f"{path} is damaged: it holds no table; {REPAIR}")
    return content


def _codec(entry: dict[str, Any]) -> str:
    """Name a codec with what decides its bytes: 'bytes little', 'crc32c'."""
    endian = entry.get("configuration", {}).get("endian", "")
    return f"{entry['name']} {endian}".strip()
