"""Documents are the same from any kind of file, and what cannot be read is named by file and line or byte."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from meshwright.data.documents import Document, DocumentReader
from meshwright.data.sources import embedded_note, embedded_sources, find_sources

TEXTS = ["plain", "two\nlines\n", "caf\u00e9 \U0001f600", "<|endoftext|>", " spaces  kept \r\n"]


def read_all(*patterns: Path | str, field: str = "text", text_unit: str = "file") -> tuple[list[Document], list[str]]:
    sources, not_found = find_sources([str(it) for it in patterns])
    assert not_found == []
    reader = DocumentReader(sources, field=field, text_unit=text_unit)
    documents = [document for number in range(len(sources)) for document in reader.read(number)]
    if not reader.problems:
        assert reader.bytes_done == sum(it.bytes for it in sources)
    return documents, reader.problems


def pack(path: Path, content: bytes) -> Path:
    match path.suffix:
        case ".gz":
            content = gzip.compress(content)
        case ".zst":
            content = zstandard.compress(content)
    path.write_bytes(content)
    return path


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": at, "text": text}).encode() + b"\n" for at, text in enumerate(texts))


def parquet(folder: Path, texts: list[str | None]) -> bytes:
    path = folder / "made.parquet"
    pq.write_table(pa.table({"n": list(range(len(texts))), "text": pa.array(texts, pa.string())}), path)
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_text_json_lines_and_parquet_hold_the_same_documents(tmp_path: Path, compression: str) -> None:
    for number, text in enumerate(TEXTS):
        pack(tmp_path / f"{number}.txt{compression}", text.encode())
    plain, problems = read_all(f"{tmp_path}/*.txt{compression}")
    assert ([it.text for it in plain], problems) == (TEXTS, [])
    for name, content in (("a.jsonl", json_lines(TEXTS)), ("a.parquet", parquet(tmp_path, list(TEXTS)))):
        documents, problems = read_all(pack(tmp_path / f"{name}{compression}", content))
        assert [(it.source, it.index, it.text) for it in documents] == [(0, n, text) for n, text in enumerate(TEXTS)]
        assert problems == []


def test_a_compressed_file_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    documents, _ = read_all(tmp_path)
    assert [it.text for it in documents] == ["one two", "one two"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.parquet.zst"])
def test_a_file_cut_short_is_named(tmp_path: Path, name: str) -> None:
    many = [f"text number {at}" for at in range(3000)]
    content = parquet(tmp_path, list(many)) if "parquet" in name else json_lines(many)
    path = pack(tmp_path / name, content)
    path.write_bytes(path.read_bytes()[:-9])
    _, problems = read_all(path)
    assert len(problems) == 1
    assert problems[0].startswith(f"{path} cannot be read as ")


def test_a_text_file_can_be_cut_into_lines_or_paragraphs(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\n two\nthree\n \n\nfour")
    cut = {unit: [(it.index, it.text) for it in read_all(path, text_unit=unit)[0]] for unit in ("line", "paragraph")}
    assert cut["line"] == [(0, "one"), (2, " two"), (3, "three"), (4, " "), (6, "four")]
    assert cut["paragraph"] == [(0, "one"), (1, " two\nthree"), (2, "four")]
    assert read_all(path)[0][0].text == "one\r\n\r\n two\nthree\n \n\nfour"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.zst"])
@pytest.mark.parametrize("text_unit", ["file", "line", "paragraph"])
def test_a_file_that_is_not_utf8_is_named_with_the_offset_of_the_byte(
    tmp_path: Path, name: str, text_unit: str
) -> None:
    path = pack(tmp_path / name, b'{"text": "x"}\n{"text": "caf\xe9"}\n')
    _, problems = read_all(path, text_unit=text_unit)
    where = "of the unpacked text" if name.endswith("zst") else "of the file"
    assert problems == [
        f"{path} is not UTF-8: byte 0xe9 at offset 27 {where} (invalid continuation byte); "
        "convert it, for example with iconv -f latin1 -t utf-8"
    ]


def test_every_bad_line_of_json_is_named_at_once(tmp_path: Path) -> None:
    lines = ['{"text": "good"}', '{"text": "bad"', '{"body": "x", "id": 1}', "", '["a"]', '{"text": 3}']
    path = pack(tmp_path / "a.jsonl", "\n".join([*lines, r'{"text": "\ud800"}', '{"text": "fine"}']).encode())
    documents, problems = read_all(path)
    assert [(it.index, it.text) for it in documents] == [(0, "good"), (7, "fine")]
    assert [line.removeprefix(f"{path}, ") for line in problems] == [
        "line 2: not JSON (Expecting ',' delimiter: line 1 column 15 (char 14))",
        "line 3: has no field 'text'; it has ['body', 'id']: name one with --field",
        "line 5: holds list, an object was expected",
        "line 6: field 'text' holds int, text was expected",
        "line 7: field 'text' holds half of a surrogate pair at character 0",
    ]


def test_a_file_of_bad_lines_does_not_fill_the_screen(tmp_path: Path) -> None:
    _, problems = read_all(pack(tmp_path / "a.jsonl", b"no json\n" * 5000))
    assert len(problems) == 21
    assert problems[-1] == "... and more of this kind"


def test_a_column_that_is_missing_null_or_no_text_is_named(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.parquet", parquet(tmp_path, ["a", None, "b"]))
    documents, problems = read_all(path)
    assert [(it.index, it.text) for it in documents] == [(0, "a"), (2, "b")]
    assert problems == [f"{path}, row 2: column 'text' is null"]
    assert read_all(path, field="body")[1] == [
        f"{path} has no column 'body'; it has ['n', 'text']: name one with --field"
    ]
    assert read_all(path, field="n")[1] == [f"{path}: column 'n' holds int64, text was expected"]


def test_a_column_of_repeated_texts_kept_as_a_dictionary_reads_as_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()}), tmp_path / "a.parquet")
    documents, problems = read_all(tmp_path / "a.parquet")
    assert ([it.text for it in documents], problems) == (["a", "b", "a"], [])


def test_documents_without_text_are_left_out_and_numbers_stay(tmp_path: Path) -> None:
    documents, problems = read_all(pack(tmp_path / "a.jsonl", json_lines(["", "x", "", "y"])))
    assert ([(it.index, it.text) for it in documents], problems) == ([(1, "x"), (3, "y")], [])


def test_patterns_are_taken_in_order_and_sorted_within(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.md", "b/.hidden", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found, _ = find_sources([f"{tmp_path}/b", f"{tmp_path}/*.txt"])
    assert [Path(it.path).relative_to(tmp_path).as_posix() for it in found] == ["b/10.md", "b/2.txt", "a.txt"]


def test_every_pattern_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    long = "n" * 300
    sources, problems = find_sources(
        [f"{tmp_path}/{it}" for it in ("*.txt", "a.txt", "*.json", "b.txt", "empty", long)] + [""]
    )
    assert [it.file for it in sources] == [tmp_path / "a.txt"]
    assert [line.removeprefix(f"{tmp_path}/") for line in problems] == [
        f"a.txt is named twice, by '{tmp_path}/*.txt' and '{tmp_path}/a.txt'; name it once",
        "*.json: no file matches",
        "b.txt: no such file",
        "empty: the folder holds no files",
        f"{long}: cannot be looked up: File name too long",
        "'': an empty name (is a shell variable unset?); name a file, a folder or a glob",
    ]


def test_the_embedded_corpus_is_the_standard_library_without_its_tests() -> None:
    sources = embedded_sources()
    names = [it.path for it in sources]
    assert names == sorted(names)
    assert {"stdlib/argparse.py", "stdlib/json/decoder.py", "stdlib/unittest/case.py"} <= set(names)
    assert not [it for it in names if {"test", "tests", "site-packages", "encodings"} & set(Path(it).parts)]
    assert sum(it.bytes for it in sources) > 5_000_000
    assert "PSF-2.0" in embedded_note()
    reader = DocumentReader(sources, field="text", text_unit="file")
    assert sum(1 for number in range(len(sources)) for _ in reader.read(number)) > 300
    assert reader.problems == []
