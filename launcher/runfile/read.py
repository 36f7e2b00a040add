"""A run file and its overrides -> a RunFile, or every problem at once.

    TOML -> overrides laid over it -> preset laid beneath [model] -> tables -> checks across tables
              `key=value`             keys in the file win             types     sizes, layout, device

A key that is wrong in itself is left out and the rest is checked all the same, so that one typing error does not
hide nine others. `world_size` is how many ranks the run is meant for; without it only what no layout could change is
checked. Nothing here loads torch.
"""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from meshwright.launcher.runfile.cross_checks import check, check_on_any_world
from meshwright.launcher.runfile.messages import ConfigError, of_validation, problem
from meshwright.launcher.runfile.overrides import apply_overrides
from meshwright.launcher.runfile.tables import RunFile
from meshwright.model.presets import with_preset


def read_run_file(path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> RunFile:
    """Read a run file and lay the overrides, `train.steps=100`, over it.

    Raises:
        ConfigError: with every problem of the file, the overrides and, given `world_size`, the layout.
    """
    run_file, problems = examine(load_toml(path), overrides, world_size=world_size)
    if problems or run_file is None:
        raise ConfigError(str(path), problems)
    return run_file


def load_toml(path: str | Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        ConfigError: if it cannot be read, is no UTF-8 or is no TOML; with the line and column.
    """
    try:
        return tomllib.loads(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(str(path), [f"there is no such file; it was looked for from {Path.cwd()}"]) from error
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            str(path), [f"is no UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"]
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), [f"is no TOML: {error}"]) from error


def examine(
    tables: dict[str, Any], overrides: Sequence[str] = (), *, world_size: int | None = None
) -> tuple[RunFile | None, list[str]]:
    """Return the RunFile that these tables make, None if they make none, and every problem found."""
    tables, problems = apply_overrides(tables, overrides)
    model = tables.get("model")
    if isinstance(model, dict):
        try:
            tables["model"] = with_preset(model)
        except (ValueError, TypeError) as error:
            problems.append(problem("model.preset", model.get("preset"), str(error)))
            tables["model"] = {**model, "preset": ""}
    try:
        run_file = RunFile.model_validate(tables)
    except ValidationError as error:
        return None, [*problems, *_table_problems(tables, error, problems, world_size)]
    return run_file, [*problems, *_across(run_file, world_size)]


def _across(run_file: RunFile, world_size: int | None) -> list[str]:
    return check_on_any_world(run_file) if world_size is None else check(run_file, world_size)


def _table_problems(
    tables: dict[str, Any], error: ValidationError, before: list[str], world_size: int | None
) -> list[str]:
    """Return a line for each wrong key, then what the checks find once those keys are left out."""
    errors = error.errors(include_url=False)
    if any(line.startswith("model.preset ") for line in before):  # its keys would be "missing" only for that reason
        errors = [entry for entry in errors if not (entry["type"] == "missing" and entry["loc"][0] == "model")]
    lines = [of_validation(entry) for entry in errors]
    for entry in errors:
        _leave_out(tables, entry["loc"])
    try:
        rest = RunFile.model_validate(tables)
    except ValidationError:
        return lines
    # What is said about a key that was left out, or about the one it was meant to be, follows from its default.
    said = " ".join(line.partition(" has: ")[0] for line in lines)
    return [*lines, *(line for line in _across(rest, world_size) if not _keys_in(line) & _keys_in(said))]


def _keys_in(text: str) -> set[str]:
    return set(re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+\b", text))


def _leave_out(tables: Any, location: Sequence[str | int]) -> None:
    """Delete the first two names' key, such as train.batch_ramp of train.batch_ramp[0].samples, if it is there."""
    names = [at for at in location if isinstance(at, str)]
    is_moe = names[:2] == ["model", "moe"]
    path = names[: 3 if is_moe else 2]
    for name in path[:-1]:
        tables = tables.get(name) if isinstance(tables, dict) else None
    if isinstance(tables, dict):
        tables.pop(path[-1], None)
