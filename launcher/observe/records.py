"""The lines of metrics.jsonl: how one is written, and how the file is read again.

    {"kind": "step", "time": 1764000000.1, "step": 120, "loss": 2.913, ...}
    {"kind": "evaluation", "time": ..., "step": 120, "validation_loss": 2.871, ...}
    {"kind": "event", "time": ..., "text": "resumed at step 100"}

JSON has no NaN and no infinity: they are written as "NaN", "Infinity" and "-Infinity", and read back as numbers.
A kill can cut the last line short; what is not a whole record is left out and counted, never an error.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

from meshwright.launcher.observe.metrics import Numbers, Value

Kind = Literal["step", "evaluation", "event"]
_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(record: Numbers) -> str:
    """Return the record as one line of strict JSON, without the line's end."""
    return json.dumps({key: _spell(value) for key, value in record.items()}, allow_nan=False)


def decode(line: str) -> Numbers | None:
    """Return the record of one line, or None if it is not a whole one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("kind") not in get_args(Kind):
        return None
    record = {
        key: _NAMES.get(value, value) if key != "text" and isinstance(value, str) else value
        for key, value in record.items()
    }
    return record if _has_its_numbers(record) else None


def read_records(path: Path) -> tuple[list[Numbers], int]:
    """Return the records of a file in their order, and how many lines were none; a missing file has none."""
    if not path.exists():
        return [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = [decode(line) for line in lines]
    whole = [record for record in records if record is not None]
    return whole, len(records) - len(whole)


def _has_its_numbers(record: dict[str, Any]) -> bool:
    """Say whether the step is one and what a summary counts with is a number; null was not measured."""
    if record["kind"] == "event":
        return True
    if type(record.get("step")) is not int or record["step"] < 0:
        return False
    counted = ("loss", "tokens", "seconds", "tokens_per_second", "mfu", "skipped", "validation_loss")
    return all(record.get(name) is None or isinstance(record[name], int | float) for name in counted)


def _spell(value: Value) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
