"""What is left to look at when a run ends: summary.json, loss.png, and a table in the terminal.

Everything is computed from metrics.jsonl, so a run that was resumed several times is summed up as one. Losses are
in nats per token. The unigram entropy is the loss of a model that knows only how often each token comes: a run whose
validation loss is not clearly below it has learned nothing of the order of tokens.
"""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from meshwright.launcher.observe.metrics import Numbers
from meshwright.launcher.observe.records import read_records
from meshwright.launcher.observe.sinks import METRICS_FILE

SUMMARY_FILE, PICTURE_FILE = "summary.json", "loss.png"

Summary = dict[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """What the summary holds beside the metrics."""

    name: str
    unigram_entropy: float | None = None
    """Mean -ln p of the validation tokens in nats, p being a token's add-one smoothed share of the train split.

    None if the store does not hold it.
    """
    checkpoint: str | None = None
    """Folder of the last checkpoint."""
    versions: dict[str, str] = field(default_factory=dict)


def write_summary(folder: Path, facts: RunFacts) -> Summary:
    """Write summary.json and loss.png into the run's folder; return the summary.

    A picture that cannot be drawn is a `picture_problem` in the summary: it is no reason to end a whole run in error.
    """
    records, _ = read_records(folder / METRICS_FILE)
    summary = summarise(records, facts)
    try:
        draw_losses(records, facts.unigram_entropy, folder / PICTURE_FILE)
        summary["picture"] = str(folder / PICTURE_FILE)
    except Exception as error:  # fonts, backends and caches of a strange machine; the numbers are written anyway
        summary["picture_problem"] = f"{type(error).__name__}: {error}"
    aside = folder / (SUMMARY_FILE + ".new")
    strict = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in summary.items()
    }
    aside.write_text(json.dumps(strict, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(folder / SUMMARY_FILE)
    return summary


def summarise(records: list[Numbers], facts: RunFacts) -> Summary:
    """Return the numbers of a whole run; one that was never measured is None."""
    steps = [record for record in records if record["kind"] == "step"]
    final_loss, best_loss, best_step = _final_and_best(_series(records, "step", "loss"))
    validation = _final_and_best(_series(records, "evaluation", "validation_loss"))
    return {
        "name": facts.name,
        "steps": int(steps[-1]["step"] or 0) if steps else 0,
        "final_loss": final_loss,
        "best_loss": best_loss,
        "best_loss_step": best_step,
        "validation_loss": validation[0],
        "best_validation_loss": validation[1],
        "best_validation_loss_step": validation[2],
        "unigram_entropy": facts.unigram_entropy,
        "tokens": sum(int(record.get("tokens") or 0) for record in steps),
        "seconds": sum(float(record.get("seconds") or 0) for record in steps),
        "tokens_per_second_median": _median(steps, "tokens_per_second"),
        "mfu_median": _median(steps, "mfu"),
        "mfu_of": steps[-1].get("mfu_of") if steps else None,
        "skipped_steps": sum(bool(record.get("skipped")) for record in steps),
        "checkpoint": facts.checkpoint,
        "versions": facts.versions,
    }


def draw_losses(records: list[Numbers], unigram_entropy: float | None, path: Path) -> None:
    """Draw train and validation loss over the steps, and the unigram entropy as a line."""
    # Imported late: it takes a second. Figure and canvas by hand: pyplot would choose a backend for the process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train := _series(records, "step", "loss"):
        axes.plot(*zip(*train, strict=True), linewidth=1, label="train")
    if validation := _series(records, "evaluation", "validation_loss"):
        axes.plot(*zip(*validation, strict=True), marker="o", markersize=4, label="validation")
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, linestyle="--", color="gray", label="unigram entropy")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=120)


def print_summary(summary: Summary, console: Console) -> None:
    """Print the table that ends a run."""
    table = Table(title=f"run {summary['name']}", box=SIMPLE, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, text in summary_rows(summary):
        table.add_row(name, text)
    console.print(table, soft_wrap=True)


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    """Return the rows of the final table: name and text; what was never measured has no row."""
    rows = [
        ("steps", f"{summary['steps']:,}, {summary['skipped_steps']} skipped"),
        ("train loss", _loss(summary, "final_loss", "best_loss")),
        ("validation loss", _loss(summary, "validation_loss", "best_validation_loss")),
    ]
    entropy, validation = summary["unigram_entropy"], summary["validation_loss"]
    if entropy is not None:
        side = "below" if validation is not None and validation < entropy else "NOT below"
        beside = "" if validation is None else f"; the validation loss is {side} it, by {abs(entropy - validation):.3f}"
        rows.append(("unigram entropy", f"{entropy:.3f}{beside}"))
    rows.append(("tokens", f"{summary['tokens']:,} in {summary['seconds']:,.1f} s"))
    if summary["tokens_per_second_median"] is not None:
        rows.append(("throughput", f"{summary['tokens_per_second_median']:,.0f} tokens/s (median step)"))
        rows.append(("mfu", f"{summary['mfu_median']:.1%} of {summary['mfu_of']}"))
    for name, key in [("checkpoint", "checkpoint"), ("loss curve", "picture"), ("no loss curve", "picture_problem")]:
        if summary.get(key) is not None:
            rows.append((name, str(summary[key])))
    return [(name, text) for name, text in rows if text]


def _loss(summary: Summary, final: str, best: str) -> str:
    if summary[final] is None:
        return ""
    if summary[best] is None:
        return f"{summary[final]:.3f}"
    return f"{summary[final]:.3f}, best {summary[best]:.3f} at step {summary[best + '_step']}"


def _series(records: list[Numbers], kind: str, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of every record of a kind that has this number."""
    pairs = [(record["step"], record.get(name)) for record in records if record["kind"] == kind]
    return [(int(step or 0), float(value)) for step, value in pairs if value is not None]


def _final_and_best(series: list[tuple[int, float]]) -> tuple[float | None, float | None, int | None]:
    """Return the last value, the lowest, and the step of the lowest; NaN is never the lowest."""
    if not series:
        return None, None, None
    numbers = [(value, step) for step, value in series if not math.isnan(value)]
    best, step = min(numbers) if numbers else (None, None)
    return series[-1][1], best, step


def _median(steps: list[Numbers], name: str) -> float | None:
    return statistics.median(float(record.get(name) or 0) for record in steps) if steps else None
