"""A store gives back its documents, and is refused when any of its files is not the one that was written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from tokenizers import Tokenizer

from meshwright.data.errors import StoreError
from meshwright.data.meta import StoreMeta
from meshwright.data.store import TokenStore


def test_every_document_comes_back_as_its_text_from_the_split_and_place_that_it_names(
    prepared: Path, corpus: Path, texts: list[str]
) -> None:
    store = TokenStore.open(prepared)
    tokenizer = Tokenizer.from_file(str(store.path / "tokenizer.json"))
    seen = []
    for split in store.splits.values():
        for number in range(split.num_documents):
            ids = split.document(number)
            assert ids[-1] == store.meta.tokenizer.end_of_text_id
            text = tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False)
            origin = split.origin(number)
            assert Path(origin.path).read_text() == text
            assert str(origin) == origin.path
            seen.append(text)
    assert sorted(seen) == sorted(texts)
    assert min(split.num_documents for split in store.splits.values()) > 3


def test_documents_of_names_the_document_of_each_token(prepared: Path) -> None:
    split = TokenStore.open(prepared).splits["train"]
    lengths = [len(split.document(number)) for number in range(split.num_documents)]
    expected = np.repeat(np.arange(split.num_documents), lengths)
    assert len(expected) == split.num_tokens
    for start in range(0, split.num_tokens, 41):
        for length in (1, 2, 40, 500):
            length = min(length, split.num_tokens - start)
            np.testing.assert_array_equal(split.documents_of(start, length), expected[start : start + length])


def test_zarr_reads_the_store_alike(prepared: Path) -> None:
    root: Any = zarr.open_group(str(prepared), mode="r")
    store = TokenStore.open(prepared)
    store.verify()
    for name, split in store.splits.items():
        for key, array in split.arrays.items():
            np.testing.assert_array_equal(root[name][key][:], array.read(0, len(array)))


def test_a_store_whose_arrays_zarr_wrote_anew_reads_the_same(store_copy: Path) -> None:
    before = TokenStore.open(store_copy).splits["train"]
    tokens = before.read(0, before.num_tokens)
    root: Any = zarr.open_group(str(store_copy), mode="r+")
    root["train"]["tokens"][:] = tokens
    again = TokenStore.open(store_copy).splits["train"]
    np.testing.assert_array_equal(again.read(0, again.num_tokens), tokens)


def test_opening_finds_every_shard_that_is_missing_or_of_another_size(store_copy: Path) -> None:
    (store_copy / "train" / "document_starts" / "c" / "0").unlink()
    short = store_copy / "validation" / "tokens" / "c" / "0"
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(StoreError) as error:
        TokenStore.open(store_copy)
    missing, cut = error.value.problems
    assert "train/document_starts/c/0 is missing" in missing
    assert "validation/tokens/c/0 has" in cut
    assert "written were" in cut


def test_files_that_cannot_be_read_are_all_named(store_copy: Path) -> None:
    loop, shard = store_copy / "tokenizer.json", store_copy / "train" / "tokens" / "c" / "0"
    for path in (loop, shard):
        path.unlink()
        path.symlink_to(path.name)
    with pytest.raises(StoreError) as error:
        TokenStore.open(store_copy)
    assert [line.split(";")[0] for line in error.value.problems] == [
        f"{path} cannot be read: Too many levels of symbolic links" for path in (loop, shard)
    ]


@pytest.mark.parametrize("name", ["meta.json", "train/tokens/zarr.json"])
def test_metadata_that_cannot_be_read_is_named(store_copy: Path, name: str) -> None:
    (store_copy / name).unlink()
    (store_copy / name).mkdir()
    with pytest.raises(StoreError, match=f"{name} cannot be read: Is a directory"):
        TokenStore.open(store_copy)


@pytest.mark.parametrize("array", ["tokens", "document_starts", "document_source", "document_index"])
def test_a_flipped_byte_in_any_array_is_found_by_verify(
    store_copy: Path, array: str, flip_byte: Callable[[Path, int], None]
) -> None:
    flip_byte(store_copy / "train" / array / "c" / "0", 3)
    store = TokenStore.open(store_copy)
    with pytest.raises(StoreError, match=f"train/{array}/c/0 is damaged: chunk 0"):
        store.verify()


def test_the_tokenizer_of_another_store_is_refused(store_copy: Path) -> None:
    path = store_copy / "tokenizer.json"
    path.write_text(path.read_text().replace("shard", "shadr"))
    with pytest.raises(StoreError, match=r"tokenizer\.json is not the tokenizer that wrote these tokens: its sha256"):
        TokenStore.open(store_copy)
    path.unlink()
    with pytest.raises(StoreError, match=r"tokenizer\.json is missing"):
        TokenStore.open(store_copy)


def test_the_arrays_of_another_store_are_refused(store_copy: Path) -> None:
    for array in ("tokens", "document_starts"):
        metadata = store_copy / "train" / array / "zarr.json"
        content = json.loads(metadata.read_text())
        content["shape"] = [content["shape"][0] - 1]
        metadata.write_text(json.dumps(content))
    with pytest.raises(StoreError) as error:
        TokenStore.open(store_copy)
    assert len(error.value.problems) == 2
    assert "meta.json says" in error.value.problems[0]


def test_metadata_that_was_edited_or_cut_short_is_refused(store_copy: Path) -> None:
    path = store_copy / "meta.json"
    text = path.read_text()
    path.write_text(text.replace('"vocab_size": 330', '"vocab_size": 329'))
    with pytest.raises(StoreError, match=r"meta\.json was changed: its checksum does not fit"):
        TokenStore.open(store_copy)
    path.write_text(text[:-20])
    with pytest.raises(StoreError, match=r"meta\.json is damaged: not JSON"):
        TokenStore.open(store_copy)
    path.write_text("{}")
    with pytest.raises(StoreError, match=r"is not the meta\.json of a token store"):
        TokenStore.open(store_copy)
    path.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(StoreError, match="version 2, this program reads 1"):
        TokenStore.open(store_copy)


def test_a_folder_that_is_no_store_says_how_to_make_one(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(
            StoreError, match=r"is no token store: it has no meta\.json; write one with `meshwright prepare"
        ):
            TokenStore.open(path)


def test_a_sample_that_is_longer_than_a_split_is_told_of_each(prepared: Path) -> None:
    meta = StoreMeta.read(prepared)
    assert meta.problems(seq_len=64) == []
    problems = meta.problems(seq_len=10**6)
    assert [line.split(":")[0] for line in problems] == ["data.seq_len = 1000000", "data.seq_len = 1000000"]
    assert "the validation split has" in problems[1]


def test_the_fingerprint_follows_the_tokens_and_not_where_they_came_from(prepared: Path) -> None:
    meta = StoreMeta.read(prepared)
    moved = [it.model_copy(update={"path": f"elsewhere/{it.path}"}) for it in meta.sources]
    assert meta.model_copy(update={"sources": moved}).fingerprint == meta.fingerprint
    train = meta.splits["train"]
    for array in ("tokens", "document_starts"):
        arrays = train.arrays | {array: train.arrays[array].model_copy(update={"xxh3_128": "0"})}
        splits = meta.splits | {"train": train.model_copy(update={"arrays": arrays})}
        assert meta.model_copy(update={"splits": splits}).fingerprint != meta.fingerprint
