"""In which order each rank of a pipeline works, for every schedule: tables of actions, made without torch.

    F forward    B whole backward    I backward, gradient of the input only    W the gradients of the weights

    1f1b, 2 ranks, 4 micro-batches        rank 0   F0 F1 B0 F2 B1 F3 B2 B3
                                          rank 1   F0 B0 F1 B1 F2 B2 F3 B3

Which stages a rank holds, of 2 ranks with two stages each:

    loop   rank 0: 0, 2   rank 1: 1, 3    interleaved: every hand-over goes to the next rank
    V      rank 0: 0, 3   rank 1: 1, 2    zbv, dualpipev: the first and the last stage meet on rank 0

The tables are those that `torch.distributed.pipelining` executes (a test compares them, action by action), so that
what `simulate.py` finds for a table holds for the run.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from meshwright.parallel.config import V_SHAPED, ZERO_BUBBLE

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """One piece of a rank's work."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        """Return it as schedules are written down: stage, kind, micro-batch."""
        return f"{self.stage}{self.kind}{self.micro_batch}"


Orders = list[list[Action]]
"""For each rank of the pipeline, what it does, in order."""


@dataclass(frozen=True)
class Stages:
    """Which stages there are and which rank holds them."""

    schedule: str
    num_ranks: int
    per_rank: int = 1

    @property
    def count(self) -> int:
        """Return the number of stages."""
        return self.num_ranks * self.per_rank

    @property
    def is_v_shaped(self) -> bool:
        """Say whether rank 0 holds both the first and the last stage."""
        return self.schedule in V_SHAPED

    @property
    def splits_backward(self) -> bool:
        """Say whether gradients of inputs and of weights are computed apart."""
        return self.schedule in ZERO_BUBBLE

    def held_by(self, rank: int) -> tuple[int, ...]:
        """Return the stages of one rank, by rising number."""
        return tuple(stage for stage in range(self.count) if self.rank_of(stage) == rank)

    def rank_of(self, stage: int) -> int:
        """Return the rank that holds a stage."""
        around, place = divmod(stage, self.num_ranks)
        return self.num_ranks - 1 - place if self.is_v_shaped and around % 2 else place

    def takes(self, micro_batches: int) -> bool:
        """Say whether the schedule can run a step of so many micro-batches."""
        if self.schedule == "gpipe":
            return micro_batches >= 1
        if self.schedule == "dualpipev":
            return micro_batches >= self.count
        if self.schedule.startswith("interleaved"):
            # Rounds of at least `num_ranks` micro-batches, all of one length.
            return micro_batches >= self.num_ranks and micro_batches % (micro_batches // self.num_ranks) == 0
        return micro_batches >= self.num_ranks

    def rule(self) -> str:
        """Return in words which numbers of micro-batches `takes` accepts."""
        if self.schedule == "dualpipev":
            return f"at least {self.count}, the number of stages"
        if self.schedule.startswith("interleaved"):
            return f"at least {self.num_ranks}, in rounds of one length that is at least {self.num_ranks}"
        return f"at least {1 if self.schedule == 'gpipe' else self.num_ranks}"


def orders_of(stages: Stages, micro_batches: int) -> Orders:
    """Return what each rank does in a step, for a number of micro-batches that the schedule takes."""
    assert stages.takes(micro_batches), f"{stages.schedule} does not take {micro_batches} micro-batches"
    make: dict[str, Callable[[Stages, int, int], Iterator[Action]]] = {
        "gpipe": _gpipe,
        "1f1b": _one_forward_one_backward,
        "interleaved_1f1b": _interleaved,
        "interleaved_zero_bubble": _interleaved,
        "zbv": _zero_bubble_v,
        "dualpipev": _dual_pipe_v,
    }
    return [list(make[stages.schedule](stages, rank, micro_batches)) for rank in range(stages.num_ranks)]


def _gpipe(stages: Stages, rank: int, n: int) -> Iterator[Action]:
    """All forwards, then all backwards (Huang et al. 2019)."""
    yield from (Action(rank, "F", at) for at in range(n))
    yield from (Action(rank, "B", at) for at in range(n))


def _one_forward_one_backward(stages: Stages, rank: int, n: int) -> Iterator[Action]:
    """Forwards until the first gradient can come, then backward and forward in turn (Narayanan et al. 2019)."""
    ahead = min(n, stages.num_ranks - rank)
    yield from (Action(rank, "F", at) for at in range(ahead))
    for at in range(n):
        yield Action(rank, "B", at)
        if at + ahead < n:
            yield Action(rank, "F", at + ahead)


def _interleaved(stages: Stages, rank: int, n: int) -> Iterator[Action]:
    """Rounds of micro-batches through the rank's stages in turn (Narayanan et al. 2021; ZB1P: Qi et al. 2023)."""
    ranks, held = stages.num_ranks, stages.held_by(rank)
    length = n // (n // ranks)
    total = n * len(held)
    further = ranks - 1 - rank
    ahead = min((len(held) - 1) * length + (1 if stages.splits_backward else 2) * further, total)
    forwards = _rounds(held, length, total)
    backwards = _rounds(held[::-1], length, total)
    for stage, micro_batch in forwards[:ahead]:
        yield Action(stage, "F", micro_batch)
    for at, (stage, micro_batch) in enumerate(backwards):
        if at + ahead < total:
            yield Action(forwards[at + ahead][0], "F", forwards[at + ahead][1])
        yield Action(stage, "I" if stages.splits_backward else "B", micro_batch)
        if stages.splits_backward and at >= rank:
            yield Action(backwards[at - rank][0], "W", backwards[at - rank][1])
    if stages.splits_backward:
        yield from (Action(stage, "W", at) for stage, at in backwards[max(total - rank, 0) :])


def _rounds(held: tuple[int, ...], length: int, total: int) -> list[tuple[int, int]]:
    """Return (stage, micro-batch) in rounds: `length` micro-batches through the first stage, then the next, ..."""
    seen = dict.fromkeys(held, 0)
    found = []
    for at in range(total):
        stage = held[(at // length) % len(held)]
        found.append((stage, seen[stage]))
        seen[stage] += 1
    return found


def _zero_bubble_v(stages: Stages, rank: int, n: int) -> Iterator[Action]:
    """Return ZB-V (Qi et al. 2023, section 6); what is beyond `n` in its table of 2 * ranks - 1 or more is left out."""
    down, up = stages.held_by(rank)
    return (action for action in _whole_v(down, up, stages.num_ranks, rank, n) if action.micro_batch < n)


def _whole_v(down: int, up: int, ranks: int, rank: int, n: int) -> Iterator[Action]:
    next_of: dict[tuple[int, Kind], int] = {}

    def do(stage: int, kinds: str) -> Iterator[Action]:
        for kind in kinds:
            at = next_of.get((stage, kind), 0)  # type: ignore[arg-type]
            next_of[stage, kind] = at + 1  # type: ignore[index]
            yield Action(stage, kind, at)  # type: ignore[arg-type]

    total = max(2 * ranks - 1, n)
    for _ in range(2 * (ranks - rank) - 1):
        yield from do(down, "F")
    for _ in range(rank):
        yield from do(up, "F")
        yield from do(down, "F")
    for _ in range(ranks - rank):
        yield from do(up, "FIW")
    while next_of[up, "F"] < next_of[down, "F"] or next_of[down, "F"] < total:
        yield from do(down, "FIW" if next_of[down, "F"] < total else "IW")
        yield from do(up, "FIW")
    for _ in range(rank):
        yield from do(down, "I")
        yield from do(up, "I")
    for _ in range(ranks - rank):
        yield from do(down, "IW")
    for stage in (up, down):
        yield from do(stage, "W" * (next_of[stage, "I"] - next_of.get((stage, "W"), 0)))


class _DualPipeRank:
    """What one rank of DualPipeV has done so far; gradients of weights that were put off wait in a queue."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._next: dict[tuple[int, str], int] = {}
        self._put_off: deque[tuple[int, int]] = deque()

    def do(self, stage: int, kind: Kind) -> None:
        counter = (stage, "F" if kind == "F" else "backward")
        at = self._next.get(counter, 0)
        self._next[counter] = at + 1
        self.actions.append(Action(stage, kind, at))
        if kind == "I":
            self._put_off.append((stage, at))

    def catch_up(self) -> None:
        if self._put_off:
            stage, at = self._put_off.popleft()
            self.actions.append(Action(stage, "W", at))


def _dual_pipe_v(stages: Stages, rank: int, n: int) -> Iterator[Action]:
    """Return DualPipeV (DeepSeek-AI 2024, and its repository DualPipe); the comments give its names of the steps."""
    ranks, (down, up) = stages.num_ranks, stages.held_by(rank)
    work, further = _DualPipeRank(), ranks - 1 - rank
    for _ in range(2 * further):  # F0
        work.do(down, "F")
    for _ in range(rank + 1):  # F0F1
        work.do(down, "F")
        work.do(up, "F")
    for _ in range(further):  # I1W1F1
        work.do(up, "I")
        work.catch_up()
        work.do(up, "F")
    for _ in range(n - 2 * ranks + rank + 1):  # F0B1-F1B0
        work.do(down, "F")
        work.do(up, "B")
        work.do(up, "F")
        work.do(down, "B")
    for _ in range(further):  # B1-F1B0
        work.do(up, "B")
        work.do(up, "F")
        work.do(down, "B")
    # B1B0: from the middle on the gradients of the weights are put off.
    kinds: list[Kind] = ["B" if half < rank + 1 else "I" for half in range(2 * (rank + 1))]
    for at in range(rank + 1):
        work.do(up, kinds[2 * at])
        work.do(down, kinds[2 * at + 1])
    for _ in range(further):  # W0B0
        work.catch_up()
        work.do(down, "I")
    for _ in range(rank + 1):  # W0
        work.catch_up()
    return iter(work.actions)
