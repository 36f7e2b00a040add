"""The command `prepare`: a summary on stdout, problems on stderr with status 2, help that loads nothing heavy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from meshwright.data.store import TokenStore
from meshwright.launcher.commands.prepare import prepare

app = typer.Typer()
app.command()(prepare)


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(it) for it in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"This is paragraph {number}, one of many." for number in range(50)))
    return path


def test_a_store_is_written_and_described(tmp_path: Path, corpus: Path) -> None:
    arguments = (corpus, "--out", tmp_path / "s", "--documents", "paragraph", "--vocab-size", "300")
    arguments += ("--validation-fraction", "0.2", "--workers", "1", "--seq-len", "32", "--seed", "4")
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    store = TokenStore.open(tmp_path / "s")
    assert f"{store.splits['train'].num_tokens:,} tokens, {store.splits['train'].num_documents:,} documents" in out
    assert f"{store.meta.validation_unigram_nats:.3f} nats" in out
    assert store.fingerprint in out
    assert store.meta.recipe["seed"] == 4
    assert sum(split.num_documents for split in store.splits.values()) == 50
    status, out, _ = run(*arguments)
    assert status == 0
    assert "is already there, with the same contents and options: nothing was done" in out


def test_the_share_of_unknown_tokens_is_told(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1, "</s>": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("a a a b")
    arguments = (tmp_path / "a.txt", "--out", tmp_path / "s", "--tokenizer", tmp_path / "t.json")
    arguments += ("--validation-fraction", "0", "--workers", "1")
    for _ in range(2):  # written, and found there
        status, out, _ = run(*arguments)
        assert status == 0
        assert "25% of the text's tokens are unknown to it" in out


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run("", "~nobody_of_this_name/a", "--out", "")
    assert (status, err.splitlines()[0]) == (2, "prepare: 3 problems, nothing was written")
    assert "--out .: is the current folder" in err
    assert "  '': an empty name" in err
    assert "  ~nobody_of_this_name/a: no such file" in err


def test_every_problem_is_told_on_stderr_with_status_2(tmp_path: Path) -> None:
    status, out, err = run(tmp_path / "no.txt", "--out", tmp_path / "s", "--vocab-size", "12", "--workers", "-1")
    assert (status, out) == (2, "")
    assert err.splitlines() == [
        "prepare: 3 problems, nothing was written",
        "  --vocab-size 12: must be at least 257: all bytes and the end of text",
        "  --workers -1: must be at least 0",
        f"  {tmp_path}/no.txt: no such file",
    ]


def test_a_vocabulary_for_a_tokenizer_that_is_given_is_refused(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({}))
    status, _, err = run(corpus, "--out", tmp_path / "s", "--tokenizer", tmp_path / "t.json", "--vocab-size", "512")
    assert status == 2
    assert "prepare: 2 problems" in err
    assert "--vocab-size 512: is for a tokenizer trained here" in err
    assert "t.json is no tokenizer.json" in err


def test_help_loads_neither_torch_nor_numpy_nor_zarr() -> None:
    code = "import sys, meshwright.launcher.commands.prepare, meshwright.data.config, meshwright.data.meta; "
    code += "print([it for it in ('torch', 'numpy', 'zarr', 'tokenizers') if it in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
