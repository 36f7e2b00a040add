"""Which sizes a message may say would fit: those with which the whole run file goes, not only the rule that was broken.

    num_layers = 3 with a pattern of 2 layers, pp = 3      4 would fit; 2 would leave a stage without a layer
    etp = 3 of experts 40 wide, ep = 4, 8 ranks            1 and 2 would fit; 4 divides 40, and leaves ep no ranks

Three sieves, the first that leaves anything: with this size nothing is wrong that was not before; this key is right,
and what else is wrong is of keys that must be changed anyhow; whatever the broken rule itself allows. Loads no torch.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from meshwright.launcher.runfile.tables import RunFile

Problems = Callable[[RunFile], Iterable[str]]
Choose = Callable[[str, Mapping[int, RunFile]], list[int]]
"""Takes a key and the run file with each of the sizes that the broken rule allows; returns those to name."""


def all_of(_key: str, others: Mapping[int, RunFile]) -> list[int]:
    """Name all that the rule allows: for those who ask what is wrong and do not read the way out."""
    return list(others)


def chooser(run_file: RunFile, problems: Problems) -> Choose:
    """Return how to choose among sizes for `run_file`; `problems` returns what is wrong with the sizes of one."""
    known = frozenset(problems(run_file))
    wrong = {key for line in known for key in keys_of(line)}

    def choose(key: str, others: Mapping[int, RunFile]) -> list[int]:
        found = {size: frozenset(problems(other)) for size, other in others.items()}
        best = [size for size, lines in found.items() if lines <= known and not _are_of(key, lines)]
        if not best:
            mended = wrong - {key}
            best = [size for size, lines in found.items() if all(keys_of(line) <= mended for line in lines)]
        return best or list(others)

    return choose


def keys_of(line: str) -> set[str]:
    """Return the keys that a problem is told of: those that stand with a value before its rule."""
    return set(re.findall(r"([a-z_]+(?:\.[a-z_]+)+) = ", line.partition(": ")[0]))


def with_keys(run_file: RunFile, table: str, **keys: object) -> RunFile:
    """Return the run file with other values of one table; unlike a file that is read, nothing is filled in."""
    return run_file.model_copy(update={table: getattr(run_file, table).model_copy(update=keys)})


def _are_of(key: str, lines: Iterable[str]) -> bool:
    return any(key in keys_of(line) for line in lines)
