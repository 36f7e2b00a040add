"""A small corpus of known documents, and a store made of it once for the tests of this folder."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright.data.prepare import PrepareOptions, prepare

WORDS = [
    "the",
    "shard",
    "token",
    "holds",
    "reads",
    "names",
    "rank",
    "expert",
    "loss",
    "grows",
    "slowly",
    "never",
    "here",
]


def make_text(number: int) -> str:
    """Return a document that no other number has; every seventh is long, and not all of it is ASCII."""
    count = 700 if number % 7 == 3 else 20 + number % 11
    words = [WORDS[(number * 31 + at * at * 7 + at // 5) % len(WORDS)] for at in range(count)]
    return f"Document {number} \u00e9\u4e2d\U0001f600: " + " ".join(words) + ".\n"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [make_text(number) for number in range(60)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A store that no test may change; `store_copy` gives one that it may."""
    out = tmp_path_factory.mktemp("stores") / "store"
    prepare(PrepareOptions(out, (str(corpus),), vocab_size=400, validation_fraction=0.2, workers=1))
    return out


@pytest.fixture
def store_copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


@pytest.fixture
def flip_byte() -> Callable[[Path, int], None]:
    def flip(path: Path, at: int) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 0x10
        path.write_bytes(content)

    return flip
