"""What a failing rank says: once, by the right one, and no consequence beside its cause."""

import json
import os
import tempfile

import pytest

from meshwright.launcher.last_words import WORDS, LastWords, lines_of, read_words, say
from meshwright.launcher.ranks.rendezvous import LostRankError
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.parallel.checkpoint.agree import CheckpointError

CONFIG = ConfigError("a.toml", ["x = 1: no"])
LOST = LostRankError("rank 0: another rank ended")
TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("rank", "error", "said"),
    [
        (None, CONFIG, "a.toml: 1 problem, nothing was started\n  x = 1: no\n"),
        (None, OSError(28, "No space left on device", "/d"), "meshwright: [Errno 28] No space left on device: '/d'\n"),
        (0, CheckpointError("not saved"), "meshwright: not saved\n"),
        (1, CheckpointError("not saved"), ""),
        (1, ValueError("c/0 is damaged"), "meshwright: rank 1: c/0 is damaged\n"),
        (1, CONFIG, "rank 1: a.toml: 1 problem, nothing was started\n  x = 1: no\n"),
        (0, LOST, "meshwright: rank 0: another rank ended\n"),
    ],
)
def test_who_says_what_under_a_foreign_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int | None, error: Exception, said: str
) -> None:
    monkeypatch.delenv(WORDS, raising=False)
    if rank is not None:
        for name, value in {**TORCHRUN, "RANK": str(rank), "LOCAL_RANK": str(rank)}.items():
            monkeypatch.setenv(name, value)
    say(error)
    assert capsys.readouterr().err == said


def test_a_rank_leaves_its_words_to_its_parent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryFile() as file:
        assert read_words(file) is None
        monkeypatch.setenv(WORDS, str(os.dup(file.fileno())))
        say(CONFIG)
        assert capsys.readouterr().err == ""
        assert read_words(file) == LastWords.of(CONFIG)
        file.seek(0)
        assert json.loads(file.read())["is_titled"]


def test_the_parent_says_each_message_once_and_who_said_it() -> None:
    config, lost, damaged = (LastWords.of(error) for error in (CONFIG, LOST, ValueError("c/0 is damaged")))
    assert lines_of({0: config, 1: config}, 2) == [str(CONFIG)]
    assert lines_of({2: damaged, 1: damaged}, 4) == ["meshwright: ranks 1, 2: c/0 is damaged"]
    assert lines_of({0: lost, 1: damaged}, 2) == ["meshwright: rank 1: c/0 is damaged"]
    assert lines_of({0: lost, 1: None}, 2) == []  # the parent names the rank that died without a word
    assert lines_of({0: lost}, 2) == ["meshwright: rank 0: another rank ended"]
    same = LastWords.of(CheckpointError("not saved"))
    assert lines_of({0: same}, 2) == ["meshwright: not saved"]
