"""The memory-mapped reader gives what zarr gives, and never a value whose checksum does not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from meshwright.data import fast_read
from meshwright.data.errors import StoreError
from meshwright.data.fast_read import ShardedArray
from meshwright.data.write import ArrayWriter, open_group

CHUNK, SHARD_CHUNKS = 8, 4
SHARD = CHUNK * SHARD_CHUNKS


def write_with_zarr(folder: Path, values: np.ndarray, **settings: Any) -> Path:
    layout = {"chunks": (CHUNK,), "shards": (SHARD,), "compressors": [Crc32cCodec()], "filters": None} | settings
    array = zarr.create_array(str(folder), shape=values.shape, dtype=values.dtype, fill_value=0, **layout)
    array[:] = values
    return folder


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
@pytest.mark.parametrize("length", [1, 7, 8, 32, 33, 77, 96])
def test_an_array_written_by_zarr_reads_the_same(tmp_path: Path, dtype: str, length: int) -> None:
    values = np.random.default_rng(length).integers(1, 60_000, length).astype(dtype)
    array = ShardedArray(write_with_zarr(tmp_path / "a", values))
    assert len(array) == length
    assert array.dtype == values.dtype
    for start in range(0, length, 3):
        for count in (0, 1, CHUNK, SHARD + 3, length - start):
            count = min(count, length - start)
            np.testing.assert_array_equal(array.read(start, count), values[start : start + count])
    assert [array[at] for at in range(length)] == values.tolist()


def test_chunks_that_zarr_did_not_write_read_as_the_fill_value(tmp_path: Path) -> None:
    values = np.arange(1, SHARD + 1).astype(np.uint16)
    values[CHUNK : 3 * CHUNK] = 0  # zarr leaves such chunks out, and marks them in the index
    folder = write_with_zarr(tmp_path / "a", values)
    assert (folder / "c" / "0").stat().st_size == 2 * (2 * CHUNK + 4) + SHARD_CHUNKS * 16 + 4
    np.testing.assert_array_equal(ShardedArray(folder).read(0, SHARD), values)


@pytest.mark.parametrize("length", [0, 1, 5, 8, 31, 32, 33, 100])
def test_zarr_reads_what_is_appended_piece_by_piece(tmp_path: Path, length: int) -> None:
    values = np.random.default_rng(0).integers(0, 2, length).astype(np.uint16)
    writer = ArrayWriter(open_group(tmp_path), "a", "uint16", chunk_length=CHUNK, shard_chunks=SHARD_CHUNKS)
    for start in range(0, length, 7):
        writer.append(values[start : start + 7])
    meta = writer.close()
    array: Any = zarr.open_group(str(tmp_path), mode="r")["a"]
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(ShardedArray(tmp_path / "a").read(0, length), values)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "a").glob("c/*"))]
    assert (meta.length, meta.shards) == (length, sizes)


def test_a_read_beyond_the_end_is_refused(tmp_path: Path) -> None:
    array = ShardedArray(write_with_zarr(tmp_path / "a", np.arange(20, dtype=np.uint16)))
    with pytest.raises(ValueError, match="has 20 elements, 15 to 21 were asked for"):
        array.read(15, 6)
    with pytest.raises(IndexError):
        array[20]


def test_every_flipped_byte_of_a_shard_is_found(tmp_path: Path, flip_byte: Callable[[Path, int], None]) -> None:
    folder = write_with_zarr(tmp_path / "a", np.arange(1, SHARD + 1, dtype=np.uint16))
    shard = folder / "c" / "0"
    for at in range(shard.stat().st_size):
        flip_byte(shard, at)
        with pytest.raises(StoreError, match=r"a/c/0 is damaged"):
            ShardedArray(folder).read(0, SHARD)
        flip_byte(shard, at)


def test_a_flipped_byte_is_found_only_where_it_is_touched(
    tmp_path: Path, flip_byte: Callable[[Path, int], None]
) -> None:
    values = np.arange(1, 2 * SHARD + 1, dtype=np.uint16)
    folder = write_with_zarr(tmp_path / "a", values)
    flip_byte(folder / "c" / "1", 2 * (2 * CHUNK + 4))  # the third chunk of the second shard
    array = ShardedArray(folder)
    np.testing.assert_array_equal(array.read(0, SHARD + 2 * CHUNK), values[: SHARD + 2 * CHUNK])
    with pytest.raises(StoreError, match=r"c/1 is damaged: chunk 2 \(elements 48 to 55, bytes 40 to 56\) has crc32c"):
        array.read(SHARD + 2 * CHUNK - 1, 2)
    with pytest.raises(StoreError, match="--overwrite"):
        array.verify()


@pytest.mark.parametrize("keep", [0, 10, 67, 68, 100, 147])
def test_a_shard_cut_short_is_found_whatever_is_left(tmp_path: Path, keep: int) -> None:
    folder = write_with_zarr(tmp_path / "a", np.arange(1, SHARD + 1, dtype=np.uint16))
    shard = folder / "c" / "0"
    assert shard.stat().st_size == 148
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(StoreError, match=r"a/c/0 is (damaged or )?cut short"):
        ShardedArray(folder).read(0, 1)


def test_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    folder = write_with_zarr(tmp_path / "a", np.arange(1, 2 * SHARD + 1, dtype=np.uint16))
    (folder / "c" / "1").unlink()
    array = ShardedArray(folder)
    array.read(0, SHARD)
    with pytest.raises(StoreError, match="a/c/1 is missing; restore the file"):
        array.read(0, SHARD + 1)


def test_a_shard_of_another_array_is_refused_though_its_own_checksums_fit(tmp_path: Path) -> None:
    ours = write_with_zarr(tmp_path / "a", np.arange(1, SHARD + 1, dtype=np.uint16))
    other = write_with_zarr(tmp_path / "b", np.arange(1, SHARD + 1, dtype=np.uint32))
    (ours / "c" / "0").write_bytes((other / "c" / "0").read_bytes())
    with pytest.raises(StoreError, match="does not belong to this array"):
        ShardedArray(ours).read(0, 1)


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        (np.arange(9, dtype=np.uint16), {"compressors": None}),
        (np.arange(9, dtype=np.uint16), {"shards": None}),
        (np.arange(9, dtype=np.float32), {}),
        (np.arange(9, dtype=np.uint16), {"serializer": BytesCodec(endian="big")}),
        (np.ones((9, 9), np.uint16), {"chunks": (8, 8), "shards": (32, 32)}),
    ],
    ids=["no checksum", "not sharded", "floats", "big endian", "two dims"],
)
def test_an_array_of_another_layout_is_refused(tmp_path: Path, values: np.ndarray, settings: dict[str, Any]) -> None:
    folder = write_with_zarr(tmp_path / "a", values, **settings)
    with pytest.raises(StoreError, match=r"zarr\.json"):
        ShardedArray(folder)


def test_no_more_shards_stay_mapped_than_there_may_be_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_read, "SHARDS_OPEN", 2)
    values = np.arange(1, 6 * SHARD + 1, dtype=np.uint16)
    array = ShardedArray(write_with_zarr(tmp_path / "a", values))
    for _ in range(2):
        np.testing.assert_array_equal(array.read(0, len(values)), values)
        assert len(array._open) == 2
