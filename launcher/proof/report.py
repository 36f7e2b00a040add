"""What `prove` prints and writes: a table for a person, one JSON file for a program."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from meshwright.data.aside import write_whole
from meshwright.launcher.proof.compare import Verdict
from meshwright.launcher.proof.prove import LayoutResult, Plan, Proof, described
from meshwright.launcher.proof.sublayouts import said

_SHOWN = 8
_TIES = 20
_LISTED = 50  # differences of one comparison in the file


def heading(name: str, plan: Plan) -> Iterator[str]:
    """Yield what stands above the table: what is proved, and how the run was narrowed."""
    yield f"{name}: {plan.target.world} ranks ({described(plan)})"
    yield "narrowed"
    for change in plan.narrowed.changes:
        yield f"  {change}"
    yield "never above 1 together" + (": nothing" if not plan.cover.never_together else "")
    together = [" x ".join(sorted(axes)) for axes in plan.cover.never_together]
    for line in together[:_SHOWN]:
        yield f"  {line}"
    if len(together) > _SHOWN:
        yield f"  and {len(together) - _SHOWN} more sets of axes"
    yield _row("layout", "ranks", "fp64", "fp32", _own(plan), "checkpoint", "seconds")


def row(plan: Plan, result: LayoutResult) -> Iterator[str]:
    """Yield the table's line of one sub-layout, and its first difference."""
    cells = [_cell(result.verdicts.get(name), form) for name, form in (("exact", ".1e"), ("fast", ".1e"))]
    own = _cell(result.verdicts.get("own"), ".2f", " x") if _own(plan) else ""
    checkpoint = result.verdicts.get("checkpoint")
    saved = "-" if checkpoint is None else "differs" if checkpoint.differences else "equal"
    yield _row(said(result.sizes), str(result.sizes.world), *cells, own, saved, f"{result.seconds:.1f}")
    for note in result.notes:
        yield f"    not used: {note}"
    if not result.is_same:
        yield f"    {result.first}"


def ending(proof: Proof) -> Iterator[str]:
    """Yield the verdict."""
    ties = [(said(r.sizes), tie) for r in proof.results for verdict in r.verdicts.values() for tie in verdict.ties]
    if ties:
        yield f"{len(ties)} tokens went to other experts in fp32, each within rounding of a tie"
    for layout, tie in ties[:_TIES]:
        yield f"  {layout}: {tie}"
    if len(ties) > _TIES:
        yield f"  and {len(ties) - _TIES} more near ties"
    if proof.is_same:
        yield f"the same as one process; {proof.seconds:.0f} s"
        return
    failed, count = proof.different, len(proof.results)
    if silent := sum(result.gave_no_answer for result in proof.results):
        yield f"NO ANSWER from {silent} of {count} layouts: nothing is known of them; run again"
    if not failed:
        yield f"no difference on the others; {proof.seconds:.0f} s"
        return
    yield f"DIFFERENT from one process on {len(failed)} of {count} layouts; {proof.seconds:.0f} s"
    yield f"  first    {failed[0].first}"
    if proof.blame is not None and not proof.blame.axes:
        yield "  axis     none: one process shows it too, where it takes a rank's micro-batches"
    elif proof.blame is not None:
        axes = ", ".join(proof.blame.axes)
        axes += ", the only axis that the layout has" if proof.blame.is_only else ""
        yield f"  axis     {axes}; the smallest layout that shows it is {said(proof.blame.sizes)}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write plain values: a file appears whole or not at all, what is no file (a pipe, a link) is written to.

    Raises:
        OSError: naming the file, which the system's own answer (a full disk) may not.
    """
    write_whole(path, json.dumps(content, indent=1) + "\n")


def as_json(name: str, proof: Proof) -> dict[str, Any]:
    """Return the whole proof as plain values."""
    plan, blame = proof.plan, proof.blame
    return {
        "run_file": name,
        "is_same": proof.is_same,
        "ranks": plan.target.world,
        "layout": asdict(plan.target),
        "zero_stage": plan.run_file.zero.stage,
        "precision": plan.run_file.train.precision,
        "changes": [{"key": c.key, "before": c.before, "after": c.after} for c in plan.narrowed.changes],
        "active_axes": list(plan.cover.active),
        "never_together": [sorted(axes) for axes in plan.cover.never_together],
        "results": [_result(result) for result in proof.results],
        "blame": None if blame is None else asdict(blame),
        "seconds": round(proof.seconds, 1),
    }


def _result(result: LayoutResult) -> dict[str, Any]:
    return {
        "layout": asdict(result.sizes),
        "ranks": result.sizes.world,
        "is_same": result.is_same,
        "lost": result.lost,
        "gave_no_answer": result.gave_no_answer,
        "details": result.details,
        "not_used": result.notes,
        "seconds": round(result.seconds, 1),
        "passes": {name: _verdict(verdict) for name, verdict in result.verdicts.items()},
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    differences = verdict.differences[:_LISTED]
    return {
        "worst": number(verdict.worst),
        "num_ties": len(verdict.ties),
        "ties": [asdict(tie) for tie in verdict.ties],
        "num_differences": len(verdict.differences),
        "differences": [asdict(difference) | {"error": number(difference.error)} for difference in differences],
    }


def number(value: float) -> float | None:
    """Return a number as JSON has it, which knows no nan and nothing infinite."""
    return value if np.isfinite(value) else None


def _own(plan: Plan) -> str:
    precision = plan.run_file.train.precision
    return precision if precision.startswith("bf16") else ""


def _cell(verdict: Verdict | None, form: str, unit: str = "") -> str:
    if verdict is None:
        return "-"
    return f"{verdict.worst:{form}}{unit}" + (" differs" if verdict.differences else "")


def _row(*cells: str) -> str:
    widths = (44, 7, 16, 16, 16, 12, 0)
    return "".join(
        f"{cell + '  ':<{width}}" for cell, width in zip(cells, widths, strict=True) if width == 0 or cell
    ).rstrip()
