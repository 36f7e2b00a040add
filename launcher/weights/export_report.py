"""What the verification of an export found, as JSON for programs and as a page for people.

The report lies beside the exported files, so that who gets the folder sees what was compared, where and how well.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from meshwright.launcher.weights.destination import REPORT_NAME, REPORT_PAGE
from meshwright.launcher.weights.safetensors_stream import write_text


@dataclass(frozen=True)
class TensorsReport:
    """Coverage both ways: what should be in the files and is not, and what is and should not."""

    expected: int
    written: int
    missing: list[str]
    left_over: list[str]
    changed: list[str]
    """Tensors whose bits are not ours, rounded to the export's dtype."""
    not_loaded: list[str]
    """What the class missed, ignored, or found in another shape."""


@dataclass(frozen=True)
class LogitsReport:
    """Differences of logits over all positions and the whole vocabulary."""

    max_difference: float
    mean_difference: float
    largest_logit: float
    limit: float
    """What the largest difference may be."""
    finite: bool


@dataclass(frozen=True)
class GreedyDifference:
    """One position at which the two sides choose another next token."""

    where: str
    ours: int
    theirs: int
    margin: float
    """Our best logit less our second best."""
    excused: bool
    """The margin is below twice the measured difference: either choice is right."""


@dataclass(frozen=True)
class GreedyReport:
    """Next tokens compared, and the differences (the first few are listed)."""

    compared: int
    excused: int
    wrong: int
    differences: list[GreedyDifference]


@dataclass(frozen=True)
class ExportReport:
    """All that was compared."""

    class_name: str
    expected_class: str
    dtype: str
    text: str
    positions: int
    tensors: TensorsReport
    logits: LogitsReport
    greedy: GreedyReport
    tokenizer_differences: int
    versions: dict[str, str]
    rounding: dict[str, float] = field(default_factory=dict)
    """What rounding the weights changed in our own logits; empty in fp32."""

    def with_rounding(self, effect: dict[str, float]) -> "ExportReport":
        """Return this report with what rounding the weights changed."""
        return replace(self, rounding=effect)

    def failures(self) -> list[str]:
        """Return every figure that is out of bounds; empty means that the export passed."""
        found: list[str] = []
        if self.class_name != self.expected_class:
            found.append(f"transformers loads the class {self.class_name}, not {self.expected_class}")
        for what, names in (
            ("are missing from the files", self.tensors.missing),
            ("are in the files and not of the class", self.tensors.left_over),
            ("were changed on the way", self.tensors.changed),
            ("were not loaded by the class", self.tensors.not_loaded),
        ):
            if names:
                more = ", ..." if len(names) > 3 else ""
                found.append(f"{len(names)} tensors {what}: {', '.join(names[:3])}{more}")
        if not self.logits.finite:
            found.append("logits are not finite")
        # Written so that a difference that is not a number fails as well.
        if not self.logits.max_difference <= self.logits.limit:
            found.append(
                f"the largest difference of logits is {self.logits.max_difference:.3g}, allowed are "
                f"{self.logits.limit:.3g}"
            )
        if self.greedy.wrong:
            found.append(
                f"{self.greedy.wrong} of {self.greedy.compared} greedy tokens differ where the margin is above twice "
                f"the difference of logits; the first is {self.greedy.differences[0].where}"
            )
        if self.tokenizer_differences:
            found.append(f"the exported tokenizer encodes {self.tokenizer_differences} samples otherwise")
        return found


def write_report(folder: Path, report: ExportReport | None, about: dict[str, Any]) -> None:
    """Write export_report.json and export_report.md; without a report they say that nothing was verified.

    `about` is what the caller knows of the export: source, command, sizes.
    """
    failures = report.failures() if report is not None else []
    content = {
        "verified": report is not None,
        "passed": not failures if report is not None else None,
        "failures": failures,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        **about,
        **(asdict(report) if report is not None else {}),
    }
    write_text(folder / REPORT_NAME, json.dumps(content, indent=2) + "\n")
    page = [*_verdict(report, failures), "", *_table("This export", about)]
    if report is not None:
        page += ["", *_comparison(report)]
    write_text(folder / REPORT_PAGE, "\n".join(page) + "\n")


def _verdict(report: ExportReport | None, failures: list[str]) -> list[str]:
    if report is None:
        return ["# Export: not verified", "", "The verification was skipped (--skip-verify)."]
    if not failures:
        return ["# Export: verified", "", f"`{report.class_name}` of transformers computes what the model computes."]
    return ["# Export: FAILED", "", *(f"- {failure}" for failure in failures)]


def _comparison(report: ExportReport) -> list[str]:
    logits, greedy, tensors = report.logits, report.greedy, report.tensors
    rows: dict[str, Any] = {
        "text": f"{report.positions} positions of {report.text}",
        "tensors": f"{tensors.written} written, {tensors.expected} of the class, "
        f"{len(tensors.changed)} changed, {len(tensors.not_loaded)} not loaded",
        "largest difference of logits": f"{logits.max_difference:.3g} (allowed: {logits.limit:.3g})",
        "mean difference of logits": f"{logits.mean_difference:.3g}",
        "largest logit": f"{logits.largest_logit:.4g}",
        "greedy tokens": f"{greedy.compared} compared, {greedy.wrong} wrong, {greedy.excused} differ at a near tie",
        "samples tokenised otherwise": report.tokenizer_differences,
        **{f"rounding to {report.dtype}: {what}": f"{value:.3g}" for what, value in report.rounding.items()},
        **report.versions,
    }
    page = _table(f"Compared in `{report.class_name}`, in fp32", rows)
    if greedy.differences:
        page += ["", "| where | ours | theirs | margin | near tie |", "|---|---|---|---|---|"]
        page += [
            f"| {it.where} | {it.ours} | {it.theirs} | {it.margin:.3g} | {'yes' if it.excused else 'NO'} |"
            for it in greedy.differences
        ]
    return page


def _table(title: str, rows: dict[str, Any]) -> list[str]:
    return [f"## {title}", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
