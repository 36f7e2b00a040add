"""A run says what it was made with, and never ends because it cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from meshwright.launcher.observe.provenance import collect_provenance, git_state, write_provenance

CPU = torch.device("cpu")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository with one commit, away from the user's own settings of git."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "code.py").write_text("a = 1\n")
    (folder / ".gitignore").write_text("output/\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=n", "-c", "user.email=e@x", "commit", "-q", "-m", "first")
    return folder


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout.strip()


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    (checkout / "output").mkdir()
    (checkout / "output" / "metrics.jsonl").write_text("ignored")
    state = git_state(checkout)
    assert state["commit"] == git(checkout, "rev-parse", "HEAD")
    assert state["dirty"] is False
    assert "diff_hash" not in state


def test_every_kind_of_change_has_its_own_hash(checkout: Path) -> None:
    hashes = []
    for name, text in [("code.py", "a = 2\n"), ("code.py", "a = 3\n"), ("new.py", "b = 1\n"), ("new.py", "b = 2\n")]:
        (checkout / name).write_text(text)
        state = git_state(checkout)
        assert state["dirty"] is True
        hashes.append(state["diff_hash"])
    assert len(set(hashes)) == 4
    assert git_state(checkout)["diff_hash"] == hashes[-1]
    (checkout / "new.py").unlink()
    (checkout / "code.py").write_text("a = 2\n")
    assert git_state(checkout)["diff_hash"] == hashes[0]


def test_a_package_inside_someone_elses_checkout_takes_no_commit_from_it(checkout: Path) -> None:
    (checkout / "site-packages").mkdir()
    assert "installed as a package" in git_state(checkout / "site-packages")["problem"]


def test_versions_command_host_and_device_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    start = collect_provenance(CPU)
    assert start["versions"]["torch"] == torch.__version__
    assert {"python", "meshwright", "numpy"} <= set(start["versions"])
    assert start["command"][1:] == sys.argv
    assert start["host"]["cores"] == os.cpu_count()
    assert start["device"]["kind"] == "cpu"
    assert start["environment"]["SLURM_JOB_ID"] == "77"
    assert "s3cret" not in json.dumps(start)


def test_each_start_of_a_run_is_kept(tmp_path: Path) -> None:
    first, problem = write_provenance(tmp_path / "run", CPU)
    assert problem == ""
    second, _ = write_provenance(tmp_path / "run", CPU)
    written = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert written == {"starts": [first, second]}
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["provenance.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"starts": 3}', '{"starts": [', "\udcff"])
def test_a_spoilt_file_is_begun_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "provenance.json").write_bytes(content.encode(errors="surrogateescape"))
    start, problem = write_provenance(tmp_path, CPU)
    assert problem == ""
    assert json.loads((tmp_path / "provenance.json").read_text()) == {"starts": [start]}


def test_without_git_everything_else_is_still_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    start, problem = write_provenance(tmp_path / "run", CPU)
    assert problem == ""
    assert start["git"]["problem"].startswith("FileNotFoundError")
    assert start["versions"]["torch"] == torch.__version__


def test_a_git_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: Any, **keys: Any) -> None:
        raise subprocess.TimeoutExpired("git", keys["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    assert "TimeoutExpired" in collect_provenance(CPU)["git"]["problem"]


def test_a_folder_that_cannot_be_written_is_an_answer_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    start, problem = write_provenance(tmp_path / "run", CPU)
    assert "provenance.json was not written" in problem
    assert start["versions"]["torch"] == torch.__version__
