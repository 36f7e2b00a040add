"""Prove a layout: the same small run on one process and on every sub-layout, compared number by number.

plan    the run file's layout -> sub-layouts of at most 8 ranks -> a run that is narrow enough for them
prove   one process leaves its records; then each sub-layout's ranks leave theirs, and a checkpoint, which one
        process loads; each is compared (compare.py)
axis    where something differs: the smallest of these layouts, with one axis off at a time
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from meshwright.launcher.build import sizes_of
from meshwright.launcher.kernel_choices import grouped_lines
from meshwright.launcher.proof.compare import Verdict, compare_checkpoint, compare_exactly, compare_fast
from meshwright.launcher.proof.expected import expected_tensors
from meshwright.launcher.proof.forked import Fork, NoAnswerError, RankLostError
from meshwright.launcher.proof.narrow import Narrowed, alone, narrow, on_layout
from meshwright.launcher.proof.own_precision import compare_computed, compare_own, compare_sums
from meshwright.launcher.proof.passes import (
    Choices,
    choices_in,
    passes_of,
    reference_passes,
    restored,
    run_passes,
)
from meshwright.launcher.proof.record import RankRecord, Work
from meshwright.launcher.proof.sublayouts import MOST_RANKS, Cover, candidates, cover, said, without
from meshwright.launcher.runfile.cross_checks import check
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.tables import RunFile
from meshwright.parallel.config import AXES
from meshwright.parallel.mesh import Sizes
from meshwright.parallel.rank_names import named

ONE = Sizes()
PASSES = ("exact", "fast", "own", "checkpoint")
NOR_ALONE = ", and one process does not take it either"
_CPU = torch.device("cpu")
# How long ranks may take: on a machine with other work, in units of what one process took there.
_SECONDS_OF_A_LAYOUT = 150.0
_TIMES_ONE_PROCESS = 100.0
_LONGEST = 300  # characters of a message
# What an fp32 run on a CPU goes by where it can: torch's names of the fast operators.
_OPERATORS: dict[Work, str] = {
    "experts": "aten::_grouped_mm",
    "attention": "aten::_scaled_dot_product_flash_attention_for_cpu",
    "adamw": "aten::_fused_adamw_",
}


@dataclass(frozen=True)
class Plan:
    """What is proved, and on what."""

    run_file: RunFile
    target: Sizes
    cover: Cover
    narrowed: Narrowed
    passes: tuple[str, ...] = PASSES


@dataclass
class LayoutResult:
    """What came of one sub-layout."""

    sizes: Sizes
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    """By pass: exact, fast, own; and checkpoint."""
    lost: str = ""
    """Why its ranks did not come to an end, where they did not."""
    details: str = ""
    gave_no_answer: bool = False
    """Whether its ranks were slow, or killed by somebody else: then nothing is known of it."""
    notes: list[str] = field(default_factory=list)
    """What its sizes and numbers do not let serve, fast operators or clipping, and why."""
    seconds: float = 0.0

    @property
    def is_same(self) -> bool:
        """Say whether everything is as on one process."""
        return not self.lost and not any(verdict.differences for verdict in self.verdicts.values())

    @property
    def first(self) -> str:
        """Return the first difference as words; "" if there is none."""
        if self.lost:
            return self.lost
        found = ((name, v.differences[0]) for name, v in self.verdicts.items() if v.differences)
        return next((f"{name}: {difference}" for name, difference in found), "")


@dataclass(frozen=True)
class Blame:
    """Which axes a difference comes with."""

    sizes: Sizes
    """The smallest layout that shows it."""
    axes: tuple[str, ...]
    """Without any one of these the difference is gone; none, where one process in a rank's micro-batches shows it."""
    is_only: bool = False
    """Whether the layout that differed has no other axis."""


@dataclass
class Proof:
    """The whole answer."""

    plan: Plan
    results: list[LayoutResult] = field(default_factory=list)
    blame: Blame | None = None
    seconds: float = 0.0

    @property
    def is_same(self) -> bool:
        """Say whether the layout computes what one process computes."""
        return all(result.is_same for result in self.results)

    @property
    def different(self) -> list[LayoutResult]:
        """Return the layouts that do not compute the same; those without an answer are none of them."""
        return [result for result in self.results if not result.is_same and not result.gave_no_answer]


def plan_proof(run_file: RunFile, world_size: int) -> Plan:
    """Choose sub-layouts and a narrow run; the run file must have passed its checks on so many ranks.

    Raises:
        ConfigError: if there is nothing to compare, or the narrow run fits on no sub-layout.
    """
    target = sizes_of(run_file, world_size)
    if target.world == 1:
        raise ConfigError("world size", ["1: one process has no layout to prove; -n 2 would fit"])
    has_experts = run_file.model.moe is not None
    narrowed = narrow(run_file, target, candidates(target))
    covered = cover(target, has_experts=has_experts, accepts=lambda sizes: not refusals(narrowed.run_file, sizes))
    if not covered.layouts:
        problems = refusals(narrowed.run_file, candidates(target)[0])
        raise ConfigError("the narrowed run file", problems)
    if left_out := [axis for axes in covered.never_together if len(axes) == 1 for axis in axes]:
        rule = f"above 1 on no layout of at most {MOST_RANKS} ranks that the narrowed run file fits"
        raise ConfigError(
            "the narrowed run file", [f"{axis}: {rule}, so that nothing would be shown of it" for axis in left_out]
        )
    # Again, for these alone: what no sub-layout asks for need not divide.
    return Plan(run_file, target, covered, narrow(run_file, target, covered.layouts))


def refusals(run_file: RunFile, sizes: Sizes) -> list[str]:
    """Return what the run file's checks say against a layout."""
    return check(on_layout(run_file, sizes), sizes.world)


def prove(plan: Plan, tell: Callable[[LayoutResult], None] = lambda _: None) -> Proof:
    """Compare every sub-layout with one process; `tell` hears of each when it is done.

    Raises:
        RankLostError: if the one process itself does not come to an end.
    """
    began = time.monotonic()
    judge, proof = Judge(plan.narrowed.run_file, plan.passes), Proof(plan)
    for sizes in plan.cover.layouts:
        result = judge.judge(sizes)
        proof.results.append(result)
        tell(result)
    # What one process does not do either comes with no axis.
    if different := [result for result in proof.different if NOR_ALONE not in result.first]:
        proof.blame = find_axis(judge, min(different, key=lambda result: result.sizes.world))
    proof.seconds = time.monotonic() - began
    return proof


class Judge:
    """Holds the records of one process, and compares layouts with them."""

    def __init__(self, run_file: RunFile, passes: Sequence[str] = PASSES) -> None:
        """Let one process train.

        Raises:
            RankLostError: if it fails.
            ConfigError: if what it computes is no number, to which nothing can be compared.
        """
        self.run_file, self.passes = run_file, tuple(passes)
        wanted = [one for one in reference_passes(run_file.train.precision) if {one.name, *one.needed_by} & {*passes}]
        began, self.limit = time.monotonic(), _SECONDS_OF_A_LAYOUT
        (self.one,) = self._answers(1, partial(run_passes, alone(run_file), wanted, {}, None))
        self.limit = max(self.limit, _TIMES_ONE_PROCESS * (time.monotonic() - began))
        if problems := _no_numbers(self.one):
            raise ConfigError("the narrowed run file", problems)
        self.choices: Mapping[str, Choices] = {name: choices_in(record) for name, record in self.one.items()}

    def judge(self, sizes: Sizes, *, zero_stage: int | None = None, only: str = "") -> LayoutResult:
        """Run a layout and compare it; `only` names the one thing that is compared."""
        began, result = time.monotonic(), LayoutResult(sizes)
        wanted = (only,) if only else self.passes
        table = on_layout(self.run_file, sizes)
        if zero_stage is not None:
            table = table.model_copy(update={"zero": table.zero.model_copy(update={"stage": zero_stage})})
        with tempfile.TemporaryDirectory(prefix="meshwright-proof-") as folder:
            try:
                self._compare(result, table, wanted, Path(folder))
            except RankLostError as error:
                result.lost, result.details = str(error), error.details
                result.gave_no_answer = isinstance(error, NoAnswerError)
        result.seconds = time.monotonic() - began
        return result

    def _compare(self, result: LayoutResult, table: RunFile, wanted: Sequence[str], folder: Path) -> None:
        saves = "checkpoint" in wanted
        names = {"exact" if name == "checkpoint" else name for name in wanted}
        passes = [one for one in passes_of(table.train.precision) if one.name in names]
        work = partial(run_passes, table, passes, self.choices, folder if saves else None, is_cut=True)
        ranks: list[dict[str, RankRecord]] = self._answers(result.sizes.world, work)
        of_pass = {one.name: [rank[one.name] for rank in ranks] for one in passes}
        if "exact" in wanted:
            result.notes += unclipped(table, self.one["exact"])
            result.verdicts["exact"] = compare_exactly(self.one["exact"], of_pass["exact"])
        if "fast" in of_pass:
            result.verdicts["fast"] = compare_fast(self.one["start"], self.one["fast"], of_pass["fast"])
            result.notes += grouped_lines(table.model, table.parallel.etp, _CPU, torch.float32)
            require_fast_paths(result.verdicts["fast"], table, of_pass["fast"], self.one["fast"])
        if "own" in of_pass:
            result.verdicts["own"] = compare_own(self.one["start"], self.one["own"], of_pass["own"])
            compare_sums(result.verdicts["own"], self.one["start"], of_pass["own"], summands(table))
            compare_computed(result.verdicts["own"], of_pass["own"], table.train.precision)
        if saves:
            result.verdicts["checkpoint"] = self._checkpoint(table, folder, of_pass["exact"])

    def _checkpoint(self, table: RunFile, folder: Path, ranks: Sequence[RankRecord]) -> Verdict:
        """Let one process load what the ranks saved, and compare."""
        if ranks[0].not_saved:
            verdict = Verdict([])
            verdict.miss("", ranks[0].not_saved[:_LONGEST], what="checkpoint")
            return verdict
        (loaded,) = self._answers(1, partial(restored, on_layout(table, ONE), folder))
        return compare_checkpoint(loaded, ranks, self._expected)

    @cached_property
    def _expected(self) -> dict[str, tuple[int, ...]]:
        """What a checkpoint must hold, on whatever layout."""
        return expected_tensors(self.run_file)

    def _answers(self, size: int, work: Callable[[int], Any]) -> list[Any]:
        with Fork(size, work) as ranks:
            return ranks.answers(self.limit)


def summands(run_file: RunFile) -> int:
    """Return of how many products, by micro-batch and rank, any gradient is at least the sum.

    An expert multiplies the tokens of all ranks of ep and etp at once.
    """
    micro_batches = run_file.train.global_batch_size // run_file.train.micro_batch_size
    return micro_batches // (run_file.parallel.ep * run_file.parallel.etp)


def _no_numbers(one: Mapping[str, RankRecord]) -> list[str]:
    """Return the first step in which one process' loss or norm was no number, and what would help."""
    return [
        f"learning_rate.peak, optimizer, model: with these one process has loss = {step.loss:.3g} and norm ="
        f" {step.norm:.3g} in step {number} ({name}), to which nothing can be compared; values that train would fit"
        for name, record in one.items()
        for number, step in enumerate(record.steps, 1)
        if not isfinite(step.loss + step.norm)
    ][:1]


def unclipped(run_file: RunFile, one: RankRecord) -> list[str]:
    """Return that some step was not clipped, where the run clips: then nothing was shown of it."""
    limit, least = run_file.train.clip_norm, min(step.norm for step in one.steps)
    return [f"clipping, a step's norm is {least:.2g}, not above {limit:.2g}"] if limit > 0 and least <= limit else []


def require_fast_paths(verdict: Verdict, run_file: RunFile, ranks: Sequence[RankRecord], one: RankRecord) -> None:
    """Add a difference for each fast operator that serves in fp32 on this layout, and that a rank did not go by.

    A rank is asked for what it does itself: a stage of a pipeline may have no experts.
    """
    model = run_file.model
    is_plain = model.position not in ("alibi", "t5") and not model.attention_dropout
    slow = grouped_lines(model, run_file.parallel.etp, _CPU, torch.float32)
    wanted: dict[Work, bool] = {
        "adamw": True,
        "attention": is_plain and any(layer.mixer == "attention" for layer in model.layers),
        "experts": model.num_moe_layers > 0 and not slow,
    }
    for work, is_wanted in wanted.items():
        name = _OPERATORS[work]
        doing = [rank for rank, record in enumerate(ranks) if work in record.work]
        missing = [rank for rank in doing if name not in ranks[rank].operators]
        if is_wanted and (missing or not doing):
            which = f" on {named(missing)}" if missing != doing else ""
            alone = "" if name in one.operators else NOR_ALONE
            verdict.miss(name, f"the fast path was not taken{which}{alone}", what="operator")


def find_axis(judge: Judge, shown: LayoutResult) -> Blame:
    """Return the smallest layout that still shows a difference, and the axes without which it is gone."""
    only = next((name for name, verdict in shown.verdicts.items() if verdict.differences), "")
    only = "" if shown.lost else only
    sizes, stage = shown.sizes, judge.run_file.zero.stage
    needed: list[str] = []
    for axis in reversed([axis for axis in AXES if getattr(sizes, axis) > 1]):
        smaller = without(sizes, axis)
        if smaller is None or refusals(judge.run_file, smaller):
            continue
        result = judge.judge(smaller, zero_stage=stage, only=only)
        if result.is_same:
            needed.append(axis)
        elif not result.gave_no_answer:
            sizes = smaller
    if sizes == ONE:
        return Blame(ONE, ())
    if stage > 0 and judge.judge(sizes, zero_stage=0, only=only).is_same:
        needed.append(f"ZeRO-{stage}")
    is_only = sum(getattr(shown.sizes, axis) > 1 for axis in AXES) == 1
    return Blame(sizes, tuple(needed) or tuple(axis for axis in AXES if getattr(sizes, axis) > 1), is_only)


def described(plan: Plan) -> str:
    """Return the layout that is proved, as a person writes it."""
    return f"{said(plan.target)}, ZeRO-{plan.run_file.zero.stage}, {plan.run_file.train.precision}"
