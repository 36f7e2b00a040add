"""What `prepare` refuses: tokenizers that do not fit the text, and places where no store can be; nothing is left."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.data.errors import DataError
from meshwright.data.prepare import PrepareOptions, prepare
from meshwright.data.store import TokenStore


def options(out: Path, *sources: Path | str, **changes: object) -> PrepareOptions:
    small = PrepareOptions(out, tuple(map(str, sources)), vocab_size=300, validation_fraction=0.2, workers=1)
    return replace(small, **changes)  # type: ignore[arg-type]


def word_tokenizer(path: Path, unknown: str) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2, "</s>": 3}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return path


def test_a_store_that_is_there_is_left_alone_where_nothing_can_be_written(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "store"
    prepare(options(out, corpus))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert prepare(options(out, corpus)).was_there
    with pytest.raises(DataError, match="may not be written to"):
        prepare(options(tmp_path / "other", corpus))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_that_fails_on_the_text_is_named(tmp_path: Path, workers: int) -> None:
    (tmp_path / "a.txt").write_text("a b c")
    file = word_tokenizer(tmp_path / "t.json", "[UNK]")
    with pytest.raises(DataError, match=r"t\.json: this tokenizer fails on the text: .*Missing \[UNK\].*--tokenizer"):
        prepare(options(tmp_path / "s", tmp_path / "a.txt", tokenizer=file, vocab_size=None, validation_fraction=0.0,
                        workers=workers))  # fmt: skip
    assert not (tmp_path / "s").exists()


def test_a_tokenizer_that_does_not_know_most_of_the_text_is_refused(tmp_path: Path) -> None:
    file = word_tokenizer(tmp_path / "t.json", "?")
    wanted = options(tmp_path / "s", tmp_path / "a.txt", tokenizer=file, vocab_size=None, validation_fraction=0.0)
    (tmp_path / "a.txt").write_text("a x y")
    with pytest.raises(
        DataError, match=r"t\.json: 66\.7% of the text's tokens are its unknown token '\?'.*--tokenizer"
    ):
        prepare(wanted)
    assert not (tmp_path / "s").exists()
    (tmp_path / "a.txt").write_text("a b x y")
    assert prepare(wanted).meta.unknown_share == 0.5
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(DataError, match="gives no tokens at all"):
        prepare(replace(wanted, overwrite=True))
    assert TokenStore.open(tmp_path / "s").meta.unknown_share == 0.5


def test_all_bytes_know_no_unknown_token(prepared: Path) -> None:
    assert TokenStore.open(prepared).meta.unknown_share is None


@pytest.mark.parametrize("name", ["", ".", "..", "/", "n" * 300, "n" * 250, "link", "loop"])
def test_a_place_where_no_store_can_be_is_refused_by_name(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    with pytest.raises(DataError) as error:
        prepare(options(Path(name), corpus))
    (problem,) = error.value.problems
    assert (name or "--out .:") in problem
    assert sorted(it.name for it in tmp_path.iterdir()) == ["link", "loop"]


def test_a_place_beneath_a_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError) as error:
        prepare(options(tmp_path / "file" / "deep" / "s", tmp_path / "absent.txt"))
    place, missing = error.value.problems
    assert place == (
        f"--out {tmp_path}/file/deep/s: {tmp_path}/file is no folder; name another folder, for the store alone"
    )
    assert missing.endswith("absent.txt: no such file")


def test_what_prepare_has_not_written_is_not_replaced(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "s"
    prepare(options(out, corpus))
    (out / "NOTES.md").write_text("mine")
    (out / "train" / "tokens" / "c" / "mine").mkdir()
    assert prepare(options(out, corpus)).was_there  # nothing is replaced, and nothing is in the way
    with pytest.raises(DataError) as error:
        prepare(options(out, corpus, seed=1, overwrite=True))
    assert error.value.problems == (
        f"--out {out}: --overwrite would remove what prepare has not written there "
        "(NOTES.md, train/tokens/c/mine/); move it away, or name another folder",
    )
    assert (out / "NOTES.md").read_text() == "mine"


def test_a_link_to_a_folder_keeps_leading_to_the_store(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    prepare(options(tmp_path / "out", corpus))
    prepare(options(tmp_path / "out", corpus, seed=1, overwrite=True))
    assert (tmp_path / "out").is_symlink()
    assert TokenStore.open(tmp_path / "disk").meta.recipe["seed"] == 1
    assert sorted(it.name for it in tmp_path.iterdir()) == ["disk", "out"]


def test_folders_above_a_store_that_was_not_written_go_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "mine").mkdir()
    for out in (tmp_path / "new" / "deep" / "s", tmp_path / "mine" / "s"):
        with pytest.raises(DataError, match="not UTF-8"):
            prepare(options(out, tmp_path / "a.txt"))
    assert sorted(it.name for it in tmp_path.rglob("*")) == ["a.txt", "mine"]


def test_bad_contents_are_told_together_with_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\xff")
    (tmp_path / "b.jsonl").write_text('{"body": "y"}\n')
    sources = [tmp_path / it for it in ("a.txt", "no.txt", "b.jsonl")]
    with pytest.raises(DataError) as error:
        prepare(options(tmp_path / "out", *sources))
    missing, *contents = error.value.problems
    assert missing == f"{tmp_path}/no.txt: no such file"
    assert ["not UTF-8" in contents[0], "has no field 'text'" in contents[1]] == [True, True]
    monkeypatch.setattr("meshwright.data.documents.LOOKED_INTO_BYTES", 5)  # what is large is left for another time
    with pytest.raises(DataError) as error:
        prepare(options(tmp_path / "out", *sources))
    assert error.value.problems == (missing, contents[0])
