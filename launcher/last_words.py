"""What a process says when it ends because of an error that a person can mend: the message, once, on stderr.

    alone                     the message
    started by --ranks        each rank leaves its words in a file that it inherited; the parent reads all of them when
                              the ranks have ended, and says what several ranks said only once
    torchrun, srun, mpirun    rank 0 says what all ranks know alike; what one rank alone knows, it says with its number

    class attribute of an error     means
    is_same_on_all_ranks            every rank raises it, with the same words
    is_consequence                  it only tells that another rank is gone or late: left out where the cause is known

No torch is loaded here.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import IO

from meshwright.launcher.ranks.environment import who_am_i
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.parallel.rank_names import named

# Holds the descriptor of the file that a rank inherits from launcher/ranks/local_ranks.py.
WORDS = "MESHWRIGHT_WORDS_FD"


@dataclass(frozen=True)
class LastWords:
    """An error as a rank leaves it to its parent."""

    text: str
    is_titled: bool
    """Whether the text begins with the file that it is about, so that the program's name need not stand there."""
    is_same: bool
    is_consequence: bool

    @classmethod
    def of(cls, error: BaseException) -> "LastWords":
        """Take what is to be said of an error."""
        same, consequence = (bool(getattr(error, name, False)) for name in ("is_same_on_all_ranks", "is_consequence"))
        return cls(str(error), isinstance(error, ConfigError), same, consequence)

    def line(self, ranks: str = "") -> str:
        """Return what is printed; `ranks` names who says it, where that is not all."""
        named = ranks and not self.is_same and not self.text.startswith("rank ")
        return ("" if self.is_titled else "meshwright: ") + (f"{ranks}: " if named else "") + self.text


def say(error: BaseException) -> None:
    """Tell the user why this process ends, by the way that fits how it was started."""
    words = LastWords.of(error)
    if WORDS in os.environ:
        os.write(int(os.environ[WORDS]), json.dumps(asdict(words)).encode())
        return
    try:
        info = who_am_i()
    except ValueError:  # the error that is to be told, perhaps
        info = None
    if info is None or info.is_alone:
        print(words.line(), file=sys.stderr)
    elif info.rank == 0 or not words.is_same:
        print(words.line(f"rank {info.rank}"), file=sys.stderr)


def read_words(file: IO[bytes]) -> LastWords | None:
    """Return what a rank left in its file, if anything."""
    file.seek(0)
    content = file.read()
    return LastWords(**json.loads(content)) if content else None


def is_consequence(words: LastWords | None) -> bool:
    """Say whether a rank ended only because another one did; one that left no words may be the cause."""
    return words is not None and words.is_consequence


def lines_of(failed: Mapping[int, LastWords | None], num_ranks: int) -> list[str]:
    """Return what to print of the ranks that failed: each message once, and no consequence where a cause is known."""
    is_cause_known = not all(is_consequence(words) for words in failed.values())
    ranks_of: dict[LastWords, list[int]] = {}
    for rank, words in failed.items():
        if words is not None and not (is_cause_known and is_consequence(words)):
            ranks_of.setdefault(words, []).append(rank)
    return [words.line(_named(ranks, num_ranks)) for words, ranks in ranks_of.items()]


def _named(ranks: list[int], num_ranks: int) -> str:
    if len(ranks) == num_ranks:
        return ""
    return named(ranks)
