"""Preparing a store: the same bytes from the same text, whole or not at all, and split by document."""

import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from meshwright.data.aside import written_aside
from meshwright.data.errors import DataError
from meshwright.data.prepare import PrepareOptions, is_validation, prepare
from meshwright.data.store import TokenStore


def options(out: Path, *sources: Path | str, **changes: object) -> PrepareOptions:
    small = PrepareOptions(out, tuple(map(str, sources)), vocab_size=300, validation_fraction=0.2, workers=1)
    return replace(small, **changes)  # type: ignore[arg-type]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts_of(store: Path, split: str) -> list[str]:
    from tokenizers import Tokenizer

    opened = TokenStore.open(store)
    tokenizer = Tokenizer.from_file(str(opened.path / "tokenizer.json"))
    part = opened.splits[split]
    return [tokenizer.decode(part.document(number)[:-1].tolist()) for number in range(part.num_documents)]


def write_lines(path: Path, count: int = 40) -> Path:
    path.write_text("".join(f'{{"text": "line number {at} of a few"}}\n' for at in range(count)))
    return path


def test_the_store_is_the_same_bytes_whatever_the_number_of_workers(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshwright.data.encode.TASK_CHARACTERS", 2000)  # several tasks for each worker
    stores = []
    for workers in (1, 2, 3):
        prepare(options(tmp_path / str(workers), corpus, workers=workers))
        stores.append(files_of(tmp_path / str(workers)))
    assert stores[0] == stores[1] == stores[2]
    assert stores[0].keys() >= {"meta.json", "tokenizer.json", "train/tokens/c/0", "validation/tokens/c/0"}


def test_a_large_text_cut_into_several_tasks_keeps_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", 200)
    prepare(options(tmp_path / "whole", path))
    monkeypatch.setattr("meshwright.data.encode.TASK_DOCUMENTS", 3)
    prepare(options(tmp_path / "pieces", path))
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "pieces")
    store = TokenStore.open(tmp_path / "whole")
    for split in store.splits.values():
        lines = [split.origin(number).index for number in range(split.num_documents)]
        assert lines == sorted(lines)
        assert str(split.origin(0)) == f"{path}, line {lines[0] + 1}"


def test_the_split_is_decided_by_each_documents_text_and_the_seed(tmp_path: Path, corpus: Path) -> None:
    prepare(options(tmp_path / "a", corpus))
    held_out = set(texts_of(tmp_path / "a", "validation"))
    assert held_out == {text for text in map(Path.read_text, corpus.iterdir()) if is_validation(text, 0, 0.2)}
    assert not held_out & set(texts_of(tmp_path / "a", "train"))

    fewer = tmp_path / "fewer"  # half of the documents, under other names: each stays on its side
    fewer.mkdir()
    for path in sorted(corpus.iterdir())[::2]:
        (fewer / f"other-{path.name}").write_bytes(path.read_bytes())
    prepare(options(tmp_path / "b", fewer))
    assert set(texts_of(tmp_path / "b", "validation")) <= held_out
    prepare(options(tmp_path / "c", corpus, seed=1))
    assert set(texts_of(tmp_path / "c", "validation")) != held_out


def test_the_share_held_out_is_the_one_asked_for() -> None:
    count = sum(is_validation(f"text {number}", seed=7, fraction=0.1) for number in range(20_000))
    assert abs(count - 2000) < 5 * math.sqrt(2000)


def test_without_a_validation_fraction_there_is_one_split(tmp_path: Path, corpus: Path) -> None:
    prepared = prepare(options(tmp_path / "a", corpus, validation_fraction=0.0))
    assert list(TokenStore.open(tmp_path / "a").splits) == ["train"]
    assert prepared.meta.validation_unigram_nats is None


def test_the_unigram_loss_is_that_of_the_validation_tokens_under_the_train_frequencies(prepared: Path) -> None:
    store = TokenStore.open(prepared)
    train, validation = (store.splits[it].read(0, store.splits[it].num_tokens) for it in ("train", "validation"))
    counts = Counter(train.tolist())
    total = len(train) + store.vocab_size
    expected = -sum(math.log((counts[token] + 1) / total) for token in validation.tolist()) / len(validation)
    assert store.meta.validation_unigram_nats == pytest.approx(expected, rel=1e-12)


def test_the_meta_counts_what_is_there(prepared: Path, texts: list[str]) -> None:
    store = TokenStore.open(prepared)
    assert [it.num_documents for it in store.meta.sources] == [1] * len(texts)
    assert sum(it.bytes for it in store.meta.sources) == sum(len(text.encode()) for text in texts)
    assert store.meta.dtype == "uint16"
    assert int(store.splits["train"].read(0, store.splits["train"].num_tokens).max()) < store.vocab_size


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path: Path, corpus: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = sorted({word for path in corpus.iterdir() for word in path.read_text().split()})
    words = {word: 10 + number for number, word in enumerate(known)}
    for last, dtype in ((65_535, "uint16"), (65_536, "uint32")):
        tokenizer = Tokenizer(models.WordLevel({**words, "Document": 5, "a": 6, "</s>": last}, unk_token="a"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(tmp_path / f"{last}.json"))
        out = tmp_path / f"store{last}"
        prepare(options(out, corpus, tokenizer=tmp_path / f"{last}.json", vocab_size=None))
        store = TokenStore.open(out)
        assert store.meta.dtype == dtype
        document = store.splits["train"].document(0)
        assert document.dtype == np.dtype(dtype)
        assert (document[0], document[-1]) == (5, last)


def test_an_equal_store_is_left_alone_and_another_is_refused_by_what_differs(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "a"
    first = prepare(options(out, corpus))
    changed = (out / "meta.json").stat().st_mtime_ns
    again = prepare(options(out, corpus, workers=2))
    assert (first.was_there, again.was_there) == (False, True)
    assert again.meta == first.meta
    assert (out / "meta.json").stat().st_mtime_ns == changed
    with pytest.raises(
        DataError, match=r"holds another store; different are: seed \(there 0, asked for 1\); .*--overwrite"
    ):
        prepare(options(out, corpus, seed=1))
    assert TokenStore.open(out).meta == first.meta
    assert prepare(options(out, corpus, seed=1, overwrite=True)).meta.recipe["seed"] == 1
    assert [it.name for it in tmp_path.iterdir()] == ["a"]


def test_a_changed_source_is_another_store(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl")
    prepare(options(tmp_path / "s", path))
    path.write_text(path.read_text().replace("number 7", "number 8"))  # the same length
    with pytest.raises(DataError, match="different are: sources;"):
        prepare(options(tmp_path / "s", path))


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl")

    def touch(phase: str, done: int, total: int) -> None:
        if phase == "encoding":
            write_lines(path, 41)

    with pytest.raises(DataError, match=r"a\.jsonl was changed while it was read"):
        prepare(options(tmp_path / "s", path), touch)
    assert not (tmp_path / "s").exists()


def test_a_folder_that_is_no_store_is_never_replaced(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="holds files that are not a token store, which prepare never touches"):
        prepare(options(tmp_path / "mine", corpus, overwrite=True))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_bad_input_leaves_nothing_and_names_everything(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\xff")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"body": "y"}\n')
    with pytest.raises(DataError) as error:
        prepare(options(tmp_path / "out", tmp_path / "a.txt", tmp_path / "b.jsonl"))
    assert len(error.value.problems) == 2
    assert "a.txt is not UTF-8: byte 0xff at offset 4" in error.value.problems[0]
    assert "b.jsonl, line 2: has no field 'text'" in error.value.problems[1]
    assert sorted(it.name for it in tmp_path.iterdir()) == ["a.txt", "b.jsonl"]


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="the corpus is empty: no source holds any text"):
        prepare(options(tmp_path / "out", tmp_path / "a.txt"))


@pytest.mark.parametrize(("fraction", "empty"), [(0.001, "validation"), (0.999, "train")])
def test_a_split_without_documents_is_refused(tmp_path: Path, fraction: float, empty: str) -> None:
    (tmp_path / "a.txt").write_text("only one document")
    with pytest.raises(DataError, match=f"the {empty} split is empty: .* of 1 documents.*--documents"):
        prepare(options(tmp_path / "out", tmp_path / "a.txt", validation_fraction=fraction))


def test_a_corpus_too_small_for_one_window_is_refused_in_both_splits(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(DataError) as error:
        prepare(options(tmp_path / "out", corpus, seq_len=10**6))
    assert [("train split" in line, "validation split" in line) for line in error.value.problems] == [
        (True, False),
        (False, True),
    ]
    assert not (tmp_path / "out").exists()


def test_every_option_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = PrepareOptions(
        tmp_path / "file", ("nothing.txt",), source_format="csv", text_unit="page", vocab_size=12, end_of_text="x",
        validation_fraction=1.0, seed=-1, seq_len=-1, workers=-1,
    )  # fmt: skip
    with pytest.raises(DataError) as error:
        prepare(wrong)
    assert [line.split()[0] for line in error.value.problems] == [
        "--format", "--documents", "--vocab-size", "--end-of-text", "--validation-fraction", "--seed", "--seq-len",
        "--workers", "--out", "nothing.txt:",
    ]  # fmt: skip


STOPS_IN_THE_MIDDLE = """
import sys, time
from pathlib import Path
from meshwright.data import encode
from meshwright.data.prepare import PrepareOptions, prepare

def report(phase, done, total):
    if phase == "encoding":
        print("now", flush=True)
        time.sleep(60)

if __name__ == "__main__":
    encode.TASK_CHARACTERS = 2000
    out, corpus, overwrite = sys.argv[1:]
    prepare(PrepareOptions(Path(out), (corpus,), vocab_size=300, validation_fraction=0.2, workers=2,
                           seed=int(overwrite), overwrite=bool(int(overwrite))), report)
"""


@pytest.mark.parametrize("had_one", [False, True])
def test_kill_9_in_the_middle_leaves_what_was_there_and_no_process(tmp_path: Path, corpus: Path, had_one: bool) -> None:
    out = tmp_path / "stores" / "a"
    if had_one:
        prepare(options(out, corpus))
    before = files_of(out)
    script = tmp_path / "script.py"
    script.write_text(STOPS_IN_THE_MIDDLE)
    command = [sys.executable, str(script), str(out), str(corpus), str(int(had_one))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "now\n"
        workers = psutil.Process(writer.pid).children(recursive=True)
        assert len(workers) >= 2
        with pytest.raises(DataError, match="another process is writing"):
            prepare(options(out, corpus, seed=5, overwrite=True))
        writer.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not [it for it in alive if it.status() != psutil.STATUS_ZOMBIE]
    assert files_of(out) == before
    assert [it.name for it in out.parent.iterdir() if it != out] == [".a.preparing"]
    prepare(options(out, corpus, seed=1, overwrite=True))
    prepare(options(tmp_path / "clean", corpus, seed=1))
    assert files_of(out) == files_of(tmp_path / "clean")
    assert [it.name for it in out.parent.iterdir()] == ["a"]


def test_a_kill_between_the_two_renames_gives_the_old_store_back(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "a"
    prepare(options(out, corpus))
    before = files_of(out)
    out.rename(tmp_path / ".a.replaced")
    with pytest.raises(DataError, match="holds another store"):
        prepare(options(out, corpus, seed=1))
    assert files_of(out) == before


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, corpus: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # no file may grow beyond it: EFBIG in place of ENOSPC
    try:
        with pytest.raises(DataError, match=r"the store cannot be written \(File too large.*nothing was left behind"):
            prepare(options(tmp_path / "out", corpus))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_thread_that_still_writes_when_an_error_comes_leaves_nothing(tmp_path: Path) -> None:
    def keep_writing(folder: Path) -> None:
        until = time.monotonic() + 0.2
        while time.monotonic() < until and folder.is_dir():
            with suppress(OSError):  # the folder may go between the look and the write
                (folder / str(time.monotonic_ns())).touch()

    def fail() -> None:
        with written_aside(tmp_path / "out") as aside:
            threading.Thread(target=keep_writing, args=(aside,)).start()
            time.sleep(0.02)
            raise DataError("no")

    with pytest.raises(DataError, match="no"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill_a_worker(phase: str, done: int, total: int) -> None:
        for process in psutil.Process(os.getpid()).children():
            with suppress(psutil.Error):  # one that is gone already
                if phase == "encoding" and "multiprocessing.spawn" in " ".join(process.cmdline()):
                    process.kill()
        time.sleep(0.05)

    monkeypatch.setattr("meshwright.data.encode.TASK_DOCUMENTS", 20)
    path = write_lines(tmp_path / "a.jsonl", 1000)
    with pytest.raises(DataError, match=r"a process that tokenizes died.*--workers"):
        prepare(options(tmp_path / "out", path, workers=2), kill_a_worker)
    assert not (tmp_path / "out").exists()


def test_the_embedded_corpus_is_prepared_with_a_note_on_its_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from meshwright.data import prepare as module

    few = [it for it in module.embedded_sources() if it.path.startswith(("stdlib/json/", "stdlib/http/"))]
    monkeypatch.setattr(module, "embedded_sources", lambda: few)
    meta = prepare(options(tmp_path / "out")).meta
    assert "licence: PSF-2.0" in meta.corpus
    assert [it.path for it in meta.sources][:2] == ["stdlib/http/__init__.py", "stdlib/http/client.py"]
