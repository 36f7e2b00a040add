"""Prove that a run can stop anywhere and go on elsewhere: k steps, a kill, k steps, against 2k unbroken ones.

    unbroken   2k steps on the run file's layout
    broken     k steps on it, a checkpoint, into the next step, then every rank is killed (SIGKILL)
    resumed    from that checkpoint to step 2k, on another layout

    fp64, another layout            same token ids, same learning rates; losses and norms to 1e-9, and at the end every
                                    weight, moment and value beside them (held.py): six steps use few of them
    own precision, same layout      all of that bit for bit; and the weights that the model computes with are the
                                    masters, rounded

What the ranks do is in `trained.py`; the run is as narrow as for `prove`.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from meshwright.launcher.build import sizes_of
from meshwright.launcher.proof.compare import EXACT
from meshwright.launcher.proof.forked import Fork, NoAnswerError, RankLostError
from meshwright.launcher.proof.held import compare_bits, compare_held, compare_states
from meshwright.launcher.proof.narrow import Narrowed, narrow, on_layout
from meshwright.launcher.proof.own_precision import masters_after, other_than_masters
from meshwright.launcher.proof.passes import Precision
from meshwright.launcher.proof.prove import refusals
from meshwright.launcher.proof.record import RankRecord, StepRecord
from meshwright.launcher.proof.sublayouts import cover, said
from meshwright.launcher.proof.trained import Trained, marked, train_rank
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.resume_rules import compare_for_resume
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.training.saving import checkpoints_of
from meshwright.parallel.checkpoint.folder import list_checkpoints
from meshwright.parallel.config import AXES
from meshwright.parallel.fits import divisors
from meshwright.parallel.mesh import Sizes

TokenIds = list[tuple[tuple[int, int], int]]
"""What a rank has: (sample, position), and the id there."""
_SECONDS = 150.0


@dataclass(frozen=True)
class ResumePlan:
    """From which layouts to which, and the narrow run."""

    run_file: RunFile
    narrowed: Narrowed
    pairs: tuple[tuple[Sizes, Sizes], ...]
    steps: int
    """k: made before the kill, and again as many after it."""


@dataclass
class ResumeResult:
    """What came of one way of going on."""

    before: Sizes
    after: Sizes
    precision: Precision
    is_bitwise: bool
    """Whether every bit was asked for."""
    differences: list[str] = field(default_factory=list)
    worst: float = 0.0
    """The largest relative difference of a loss or a norm."""
    worst_held: float = 0.0
    """The largest difference of a weight or a moment at the end, over its tensor's largest value."""
    tokens: int = 0
    """Tokens that were compared, id by id."""
    seconds: float = 0.0
    gave_no_answer: bool = False
    """Whether its ranks were slow, or killed by somebody else: then nothing is known of it."""

    @property
    def is_same(self) -> bool:
        """Say whether the resumed run is the unbroken one."""
        return not self.differences

    @property
    def allowed(self) -> float:
        """Return by how much a float may be off, over its size."""
        return 0.0 if self.is_bitwise else EXACT


def plan_resume(run_file: RunFile, world_size: int, changed: tuple[RunFile, int], steps: int) -> ResumePlan:
    """Choose layouts of at most 8 ranks and a narrow run; the run file must have passed its checks.

    `changed` is the run file to go on with, and its ranks (`go_on_with`).

    Raises:
        ConfigError: if the narrow run does not fit on one of the small layouts.
    """
    before, after = sizes_of(run_file, world_size), sizes_of(*changed)
    has_experts = run_file.model.moe is not None
    sides = [cover(sizes, has_experts=has_experts).layouts or (Sizes(),) for sizes in (before, after)]
    largest = Sizes(**{axis: max(getattr(before, axis), getattr(after, axis)) for axis in AXES})
    narrowed = narrow(run_file, largest, [*sides[0], *sides[1]])
    for sizes in (*sides[0], *sides[1]):
        if problems := refusals(narrowed.run_file, sizes):
            raise ConfigError(f"the narrowed run file on {said(sizes)}", problems)
    count = max(map(len, sides))
    pairs = zip(*(islice(cycle(side), count) for side in sides), strict=True)
    return ResumePlan(run_file, narrowed, tuple(pairs), steps)


def verify_resume(plan: ResumePlan, tell: Callable[[ResumeResult], None] = lambda _: None) -> list[ResumeResult]:
    """Compare each way of going on with the unbroken run; `tell` hears of each when it is done."""
    own, results = plan.run_file.train.precision, []
    first = plan.pairs[0][0]
    ways: list[tuple[Sizes, Sizes, Precision]] = [(first, first, own)]
    ways += [(before, after, "fp64") for before, after in plan.pairs if (before, after, own) != (first, first, "fp64")]
    for before, after, precision in ways:
        result = ResumeResult(before, after, precision, is_bitwise=before == after)
        began = time.monotonic()
        try:
            _go_on(plan, result)
        except RankLostError as error:
            result.differences.append(str(error))
            result.gave_no_answer = isinstance(error, NoAnswerError)
        result.seconds = time.monotonic() - began
        results.append(result)
        tell(result)
    return results


def _go_on(plan: ResumePlan, result: ResumeResult) -> None:
    table = plan.narrowed.run_file
    # More often than once before the kill, where that can be: the newest is to be gone on from.
    every = max((size for size in divisors(plan.steps) if size < plan.steps), default=1)
    table = table.model_copy(
        update={
            "train": table.train.model_copy(update={"steps": 2 * plan.steps}),
            "checkpoint": table.checkpoint.model_copy(update={"every": every}),
        }
    )
    before, after = on_layout(table, result.before), on_layout(table, result.after)
    with tempfile.TemporaryDirectory(prefix="meshwright-resume-") as folder:
        unbroken, broken = Path(folder) / "unbroken", Path(folder) / "broken"
        leg = partial(train_rank, precision=result.precision, gathers=result.is_bitwise)
        expected = _unbroken(result.before.world, partial(leg, before, unbroken))
        with Fork(result.before.world, partial(leg, before, broken, kill_after=plan.steps)) as ranks:
            ranks.kill_when(lambda: marked(broken, result.before.world), _SECONDS)
        with Fork(result.after.world, partial(leg, after, broken)) as ranks:
            found: list[Trained] = ranks.answers(_SECONDS)
        kept = [list_checkpoints(checkpoints_of(run)) for run in (unbroken, broken)]
    for record in expected:
        del record.steps[: plan.steps]
    compare_steps(result, expected, found, first_step=plan.steps)
    _compare_ends(result, expected, found)
    state, changes = expected[0].state, compare_for_resume(before, after)[0]
    # What a resume changed is told in the state itself.
    state["changes"] += [f"step {plan.steps}: {change}" for change in changes]
    result.differences += compare_states(state, [record.state for record in found], result.allowed)
    if kept[0] != kept[1]:
        result.differences.append(f"at the end: the checkpoints of the steps {kept[1]} are there, not of {kept[0]}")


def _unbroken(world: int, leg: Callable[[int], Trained]) -> list[Trained]:
    """Return what the run that goes on without a kill came to.

    Raises:
        NoAnswerError: if its ranks were slow, or somebody killed one.
        ConfigError: if it does not come to its end by itself: then there is nothing to compare with.
    """
    try:
        with Fork(world, leg) as ranks:
            found: list[Trained] = ranks.answers(_SECONDS)
            return found
    except NoAnswerError:
        raise
    except RankLostError as error:
        raise ConfigError("the unbroken run", [f"{error}; there is nothing to compare a resumed one with"]) from None


def _compare_ends(result: ResumeResult, expected: Sequence[Trained], found: Sequence[Trained]) -> None:
    """Compare every tensor that a checkpoint has, and bit for bit what the model would compute with next."""
    held = [[record.held for record in records] for records in (expected, found)]
    if result.is_bitwise:
        result.differences += compare_bits(*held)
        for who, records in (("unbroken", expected), ("resumed", found)):
            for name, note in other_than_masters(records, masters_after(records, -1, result.precision)):
                result.differences.append(f"at the end, {who}: {name}: {note}")
    elif expected[0].steps:
        differences, result.worst_held = compare_held(*held, norm=max(step.norm for step in expected[0].steps))
        result.differences += differences


def compare_steps(
    result: ResumeResult, expected: Sequence[RankRecord], found: Sequence[RankRecord], *, first_step: int
) -> None:
    """Compare token ids, learning rates, losses and norms, step by step."""
    if len(expected[0].steps) != len(found[0].steps):
        result.differences.append(f"{len(found[0].steps)} steps were made, not {len(expected[0].steps)}")
        return
    for at, theirs in enumerate(expected[0].steps):
        step = first_step + at + 1
        for what in ("tokens", "targets"):
            _compare_ids(
                result, step, what, *([_ids(each.steps[at], what) for each in run] for run in (expected, found))
            )
        for rank, ours in enumerate(record.steps[at] for record in found):
            of_rank = f"step {step}, rank {rank}"
            if ours.learning_rate != theirs.learning_rate:
                result.differences.append(f"{of_rank}: learning rate {ours.learning_rate}, not {theirs.learning_rate}")
            _compare_numbers(result, of_rank, ours, theirs)


def _compare_numbers(result: ResumeResult, of_rank: str, ours: StepRecord, theirs: StepRecord) -> None:
    """Compare losses and norms; of an evaluation, which is of the same step in both, its tokens too."""
    numbers = [("loss", ours.loss, theirs.loss), ("norm", ours.norm, theirs.norm)]
    if ours.evaluation is not None and theirs.evaluation is not None:
        numbers.append(("validation loss", ours.evaluation[0], theirs.evaluation[0]))
    if (ours.evaluation or (0, 0))[1] != (theirs.evaluation or (0, 0))[1]:
        result.differences.append(f"{of_rank}: evaluated {ours.evaluation}, not {theirs.evaluation}")
    for what, one, other in numbers:
        if not np.isfinite([one, other]).all():
            result.differences.append(f"{of_rank}: {what} {one!r}, unbroken {other!r}: that shows nothing")
            continue
        error = abs(one - other) / abs(other) if other else float(one != other)
        result.worst = max(result.worst, error)
        if error > result.allowed:
            result.differences.append(f"{of_rank}: {what} {one!r}, not {other!r}: off by {error:.2g}")


def _compare_ids(
    result: ResumeResult, step: int, what: str, expected: Sequence[TokenIds], found: Sequence[TokenIds]
) -> None:
    """Hold each rank's ids, copies too, against the unbroken run's; together the ranks must leave none out."""
    whole = {place: token for of_rank in expected for place, token in of_rank}
    result.tokens += len(whole)
    for run, ranks in (("unbroken, ", expected), ("", found)):
        for rank, of_rank in enumerate(ranks):
            if others := sum(whole.get(place) != token for place, token in of_rank):
                line = f"step {step}, {run}rank {rank}: {others} of {len(of_rank)} {what} are others"
                result.differences.append(line)
    seen = {place for of_rank in found for place, _ in of_rank}
    if left_out := len(whole.keys() - seen):
        result.differences.append(f"step {step}: {left_out} of {len(whole)} {what} are on no rank")


def _ids(step: StepRecord, what: str) -> TokenIds:
    """Return what a rank has at each (sample, position); a stage of a pipeline may have none."""
    table = step.at_tokens.get(what)
    if table is None:
        return []
    places = zip(table.sample.tolist(), table.position.tolist(), strict=True)
    return list(zip(places, table.values.tolist(), strict=True))
