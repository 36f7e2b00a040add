"""What `verify-resume` prints and writes."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from meshwright.launcher.proof.report import number
from meshwright.launcher.proof.resume import ResumePlan, ResumeResult
from meshwright.launcher.proof.sublayouts import said

_SHOWN = 5


def heading(name: str, plan: ResumePlan) -> Iterator[str]:
    """Yield what stands above the table: how the run was narrowed, and the columns."""
    yield f"{name}: {plan.steps} steps, a kill, {plan.steps} steps, against {2 * plan.steps} unbroken"
    yield "narrowed"
    for change in plan.narrowed.changes:
        yield f"  {change}"
    yield _row("from", "to", "precision", "loss, norm", "weights, moments", "ids", "seconds")


def row(result: ResumeResult) -> Iterator[str]:
    """Yield the table's line of one way of going on, and its first differences."""
    worst, held = _cells(result)
    after = "the same" if result.before == result.after else said(result.after)
    ids, seconds = f"{result.tokens:,}", f"{result.seconds:.1f}"
    yield _row(said(result.before), after, result.precision, worst, held, ids, seconds)
    for line in result.differences[:_SHOWN]:
        yield f"    {line}"
    if len(result.differences) > _SHOWN:
        yield f"    and {len(result.differences) - _SHOWN} more differences"


def _cells(result: ResumeResult) -> tuple[str, str]:
    """Return what is told of losses and norms, and of what is held at the end."""
    if not result.tokens:  # its ranks did not come to an end
        return "-", "-"
    if not result.is_bitwise:
        return f"{result.worst:.1e}", f"{result.worst_held:.1e}"
    worst = "equal bits" if result.worst == 0 else f"{result.worst:.1e}"
    return worst, "equal bits" if result.is_same else "-"


def ending(results: Sequence[ResumeResult]) -> Iterator[str]:
    """Yield the verdict."""
    seconds = sum(result.seconds for result in results)
    failed = [result for result in results if not result.is_same and not result.gave_no_answer]
    if silent := sum(result.gave_no_answer for result in results):
        yield f"NO ANSWER from {silent} of {len(results)} ways: nothing is known of them; run again"
    if failed:
        yield f"DIFFERENT from the unbroken run in {len(failed)} of {len(results)} ways; {seconds:.0f} s"
    elif silent:
        yield f"no difference on the others; {seconds:.0f} s"
    else:
        yield f"the resumed run is the unbroken one; {seconds:.0f} s"


def as_json(name: str, plan: ResumePlan, results: Sequence[ResumeResult]) -> dict[str, Any]:
    """Return the whole answer as plain values."""
    return {
        "run_file": name,
        "is_same": all(result.is_same for result in results),
        "steps": plan.steps,
        "changes": [{"key": c.key, "before": c.before, "after": c.after} for c in plan.narrowed.changes],
        "results": [
            asdict(result)
            | {"is_same": result.is_same, "worst": number(result.worst), "worst_held": number(result.worst_held)}
            for result in results
        ],
    }


def _row(*cells: str) -> str:
    widths = (36, 36, 15, 13, 18, 9, 0)
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
