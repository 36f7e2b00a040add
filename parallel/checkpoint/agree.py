"""Steps that all ranks take together, with one outcome for all: a failing rank leaves nobody waiting.

Every rank does its work and hands in what came of it, be it an error; rank 0 combines; all get the same answer
or raise the same `CheckpointError`, which names the ranks that failed. Objects travel between live ranks of one
run only; nothing here is written to disk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from meshwright.parallel.mesh import Axis, Mesh
from meshwright.parallel.rank_names import named

Mine = TypeVar("Mine")
Answer = TypeVar("Answer")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; raised on every rank with the same words."""

    is_same_on_all_ranks = True
    """For the command line, which then says it once (launcher/last_words.py)."""


@dataclass(frozen=True)
class _Failure:
    """An error as it travels between ranks."""

    text: str


class Ranks:
    """The ranks of a run over one process group on the CPU; a single process needs no group."""

    def __init__(self, world: Axis, group: dist.ProcessGroup | None) -> None:
        """Take the axis over all ranks, and a gloo group over the same ranks."""
        self.rank, self.size = world.rank, world.size
        self._group = group

    def first(self, work: Callable[[], Answer]) -> Answer:
        """Do `work` on rank 0 and return its result on every rank."""
        return self.together(lambda: None, lambda _: work())

    def together(self, work: Callable[[], Mine], combine: Callable[[list[Mine]], Answer]) -> Answer:
        """Do `work` on every rank, `combine` the results on rank 0, and return that on every rank.

        Raises:
            CheckpointError: on every rank, if one of them failed.
        """
        gathered = self._gather(_attempt(work))
        answer = [_combined(gathered, combine) if gathered is not None else None]
        if self._group is not None:
            dist.broadcast_object_list(answer, group=self._group, group_src=0)
        result: Answer = _checked(answer[0])
        return result

    def divided(self, work: Callable[[], Mine], divide: Callable[[list[Mine]], list[Answer]]) -> Answer:
        """Do `work` on every rank, `divide` the results on rank 0, and return each rank its own answer."""
        gathered = self._gather(_attempt(work))
        answers: list[Any] | None = None
        if gathered is not None:
            divided = _combined(gathered, divide)
            answers = [divided] * self.size if isinstance(divided, _Failure) else divided
        mine: list[Any] = [None]
        if self._group is not None:
            dist.scatter_object_list(mine, answers, group=self._group, group_src=0)
        else:
            assert answers is not None
            mine = answers
        result: Answer = _checked(mine[0])
        return result

    def _gather(self, mine: Any) -> list[Any] | None:
        if self._group is None:
            return [mine]
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, gathered, group=self._group, group_dst=0)
        return gathered


def _attempt(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except CheckpointError as error:
        return _Failure(str(error))
    except Exception as error:
        return _Failure(f"{type(error).__name__}: {error}")


def _combined(gathered: list[Any], combine: Callable[[list[Any]], Any]) -> Any:
    failed: dict[str, list[int]] = {}
    for rank, outcome in enumerate(gathered):
        if isinstance(outcome, _Failure):
            failed.setdefault(outcome.text, []).append(rank)
    if not failed:
        return _attempt(lambda: combine(gathered))
    if len(gathered) == 1:
        return _Failure(next(iter(failed)))
    said = [f"{named(ranks)}: {text}" for text, ranks in failed.items()]
    return _Failure("; ".join(said))


def _checked(answer: Any) -> Any:
    if isinstance(answer, _Failure):
        raise CheckpointError(answer.text)
    return answer


_RANKS: WeakKeyDictionary[Mesh, Ranks] = WeakKeyDictionary()


def ranks_of(mesh: Mesh) -> Ranks:
    """Return the mesh's ranks as the checkpoint talks to them; made once, by all ranks together.

    Over gloo the world's own group serves. Over NCCL, which moves objects through GPU memory, a gloo group is
    made beside it.
    """
    if mesh not in _RANKS:
        world = mesh.world
        own = world.group is not None and dist.get_backend(world.group) == "gloo"
        _RANKS[mesh] = Ranks(world, world.group) if own or not world.is_split else new_ranks(mesh)
    return _RANKS[mesh]


def new_ranks(mesh: Mesh, timeout: timedelta | None = None) -> Ranks:
    """Return the mesh's ranks over a new gloo group, whose messages cannot mix with another's."""
    if not mesh.world.is_split:
        return Ranks(mesh.world, None)
    return Ranks(mesh.world, dist.new_group(list(mesh.world.ranks), timeout=timeout, backend="gloo"))
