"""Local work on which all ranks must agree: where one of them finds a mistake, all end, and the words name that rank.

A folder can be missing on one node alone. The rank that sees it must not end while the others wait for it in a
collective, and what it saw must be told although it is not rank 0.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from meshwright.launcher.runfile.messages import ConfigError
from meshwright.parallel.checkpoint.agree import ranks_of
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.rank_names import named

Answer = TypeVar("Answer")


def one_outcome(mesh: Mesh, source: str, work: Callable[[], Answer]) -> Answer:
    """Do `work`, without a collective in it, on every rank; return this rank's answer if all of them have one.

    Raises:
        ConfigError: on every rank in the same words, headed by `source`, if `work` raised an error on one of them.
    """
    answers, problems = list[Answer](), list[str]()
    try:
        answers.append(work())
    except ConfigError as error:  # names a file of its own
        problems = [f"{error.source}: {problem}" for problem in error.problems]
    except ValueError as error:
        problems = str(error).splitlines()
    except Exception as error:  # a disk that fails, say: the other ranks must hear of it all the same
        problems = [f"{type(error).__name__}: {error}"]
    if told := ranks_of(mesh).together(lambda: problems, _told):
        raise ConfigError(source, told, is_same_on_all_ranks=True)
    return answers[0]


def _told(found: Sequence[list[str]]) -> list[str]:
    """Return what all found, or what each rank found, with the ranks that did."""
    ranks_with: dict[tuple[str, ...], list[int]] = {}
    for rank, problems in enumerate(found):
        ranks_with.setdefault(tuple(problems), []).append(rank)
    if len(ranks_with) == 1:
        return found[0]
    return [f"{named(ranks)}: {problem}" for problems, ranks in ranks_with.items() for problem in problems]
