"""A place that cannot be written is found before the work, and a stop says that there is no answer."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from meshwright.launcher.proof.answer import answer_place, leave, stoppable, undisturbed, with_mistakes_of
from meshwright.launcher.proof.forked import Fork
from meshwright.launcher.proof.report import write_json
from meshwright.launcher.runfile.messages import ConfigError


def test_a_place_that_can_be_written_is_returned_and_nothing_is_left_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "newer" / "proof.json"
    assert answer_place(path, "unused", "proof.json", source="x.toml") == path
    assert not list(tmp_path.iterdir())
    assert answer_place(None, str(tmp_path / "run"), "proof.json", source="x.toml") == tmp_path / "run" / "proof.json"
    assert not list(tmp_path.iterdir())


def test_an_answer_that_is_there_stays_until_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "proof.json"
    path.write_text("before")
    answer_place(path, "unused", "proof.json", source="x.toml")
    assert path.read_text() == "before"


@pytest.mark.parametrize(
    ("out", "told"),
    [
        (".", "is a folder, and must be a file; --out "),
        (
            "file/proof.json",
            "the answer cannot be written there (something on its way is no folder); name a file in a folder",
        ),
        ("new/" + "x" * 300, "the answer cannot be written there (File name too long); name a file in a folder"),
        ("nul\0", "the answer cannot be written there (embedded null byte); name a file in a folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(out: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as refused:
        answer_place(tmp_path / out, "unused", "proof.json", source="x.toml")
    assert str(refused.value).startswith("--out: 1 problem, nothing was started\n  --out = ")
    assert told in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_usual_place_is_refused_by_the_key_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as refused:
        answer_place(None, str(tmp_path / "file"), "proof.json", source="x.toml")
    assert str(refused.value).startswith("x.toml: 1 problem, nothing was started\n  run.folder = ")
    assert "--out proof.json, or another folder, would fit" in str(refused.value)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_ends_the_ranks_and_says_that_nothing_is_known(
    number: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with (
        pytest.raises(SystemExit) as ended,
        stoppable("prove", "nothing was proved", Path("x.json")),
        Fork(2, time.sleep) as ranks,
    ):
        os.kill(os.getpid(), number)
    assert ended.value.code == status
    told = f"meshwright: prove was stopped by {number.name}: nothing was proved, and x.json was not written\n"
    assert capsys.readouterr() == ("", told)
    assert not any(psutil.pid_exists(process.pid or 0) for process in ranks.processes)
    assert signal.getsignal(number) == before


def test_an_answer_that_is_known_is_written_whatever_signal_comes() -> None:
    with undisturbed():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN


def test_an_answer_replaces_an_older_one_whole_or_not_at_all(tmp_path: Path) -> None:
    path, link = tmp_path / "prove.json", tmp_path / "link.json"
    path.write_text("older")
    link.symlink_to(path)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "older"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(link, {"a": 2})
    assert link.is_symlink()
    assert json.loads(path.read_text()) == {"a": 2}
    assert sorted(tmp_path.iterdir()) == [link, path]


def test_an_answer_goes_into_what_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)  # open for both, so that neither end waits for the other
    try:
        write_json(pipe, {"a": 3})
        assert json.loads(os.read(reader, 100)) == {"a": 3}
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_an_answer_goes_to_a_file_in_a_folder_that_takes_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prove.json"
    path.write_text("older, and longer than the new one")
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(Path, "replace", None)
    write_json(path, {})
    assert path.read_text() == "{}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_is_full_is_told_with_the_file() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_json(Path("/dev/full"), {})


@pytest.mark.parametrize("is_same", [True, False])
def test_a_disk_that_is_full_at_last_takes_nothing_from_the_verdict(
    is_same: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def write() -> None:
        write_json(Path("/dev/full"), {})

    if is_same:
        with pytest.raises(ConfigError) as told:
            leave(Path("/dev/full"), write, is_same=True)
        text = str(told.value)
    else:  # exit status 1 says more than that of a mistake
        leave(Path("/dev/full"), write, is_same=False)
        text = capsys.readouterr().err
    assert "/dev/full" in text
    assert "No space left on device); the verdict above stands; --out FILE" in text


def test_the_place_of_the_answer_is_told_with_the_run_files_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused, with_mistakes_of(tmp_path, "proof.json"):
        raise ConfigError("x.toml", ["train.steps = 0: must be at least 1"])
    assert refused.value.source == "x.toml"
    first, second = refused.value.problems
    assert first.startswith("train.steps")
    assert second.startswith(f'--out = "{tmp_path}": is a folder')
    with pytest.raises(ConfigError) as refused, with_mistakes_of(None, "proof.json"):
        raise ConfigError("x.toml", ["train.steps = 0: must be at least 1"])
    assert len(refused.value.problems) == 1
