"""Write a RunFile as TOML: every key with the value that is used. What is read back is equal.

This is what a run leaves in its folder, so that nobody has to know what the defaults were on that day.
"""

import json
from collections.abc import Mapping
from typing import Any

from meshwright.launcher.runfile.tables import RunFile


def write_resolved(run_file: RunFile) -> str:
    """Return the run file as TOML text, presets and defaults written out."""
    return toml_of(as_tables(run_file))


def toml_of(tables: Mapping[str, Any]) -> str:
    """Return nested plain values as TOML text."""
    lines: list[str] = []
    for name, table in tables.items():
        _write_table(lines, name, table)
    return "\n".join(lines)


def as_tables(run_file: RunFile) -> dict[str, Any]:
    """Return the run file as nested plain values, by the keys that a user writes; what is left out is not there."""
    return run_file.model_dump(by_alias=True, exclude_none=True)


def _write_table(lines: list[str], name: str, table: Mapping[str, Any]) -> None:
    lines.append(f"[{name}]")
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lines += [f"{key} = {_value(value)}" for key, value in table.items() if key not in inner]
    lines.append("")
    for key, value in inner.items():
        _write_table(lines, f"{name}.{key}", value)


def _value(value: Any) -> str:
    """Return one value in TOML's form."""
    if isinstance(value, bool | str):
        # JSON's escapes are TOML's too, but for DEL, which JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(entry) for entry in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_value(entry)}" for key, entry in value.items()) + "}"
    raise AssertionError(f"no table holds a {type(value).__name__}")
