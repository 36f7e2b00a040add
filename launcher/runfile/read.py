"""A run file and its overrides -> a RunFile, or every problem at once.

    TOML -> overrides laid over it -> preset laid beneath [model] -> tables -> checks across tables
              `key=value`             keys in the file win             types     sizes, layout, device, store

A key that is wrong in itself is left out and the rest is checked all the same, so that one typing error does not
hide nine others. `world_size` is how many ranks the run is meant for; without it only what no layout could change is
checked. Nothing here loads torch.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from meshwright.launcher.runfile.cross_checks import check, check_on_any_world
from meshwright.launcher.runfile.input_file import MOST_NESTED, input_bytes
from meshwright.launcher.runfile.keys import field_of
from meshwright.launcher.runfile.messages import ConfigError, dotted, of_validation, problem
from meshwright.launcher.runfile.on_disk import on_disk_problems
from meshwright.launcher.runfile.overrides import apply_overrides, parse_toml
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.runfile.upcycling_checks import upcycling_problems
from meshwright.model.presets import with_preset

# Run files are of a few thousand bytes, and their lines have a few dots.
MOST_BYTES = 2**18
MOST_DOTS = 200

# Where a message about an unknown key goes on to list what there is.
LISTING = re.compile(r" has: |the tables are: ")

# What stands in for a key that must be there and is not, by its type, while the rest is checked.
STAND_INS: dict[Any, object] = {str: "unknown", float: 1.0}


# What is held against the folders that a run file names: nothing, those that are here, or all of them.
Folders = Literal["left out", "if here", "needed"]


# Sizes that a ModelConfig fills in from others, where they are left out and some check is about them.
DERIVED_FROM = {
    "model.num_kv_heads": {"model.num_heads"},
    "model.head_dim": {"model.hidden_size", "model.num_heads"},
    "model.ffn_hidden_size": {"model.hidden_size"},
}


def read_run_file(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    folders: Folders = "left out",
) -> RunFile:
    """Read a run file and lay the overrides, `train.steps=100`, over it.

    Raises:
        ConfigError: with every problem of the file, the overrides and, where they are asked for, of the layout on
            `world_size` ranks and of the store and other `folders`.
    """
    run_file, problems = examine(load_toml(path), overrides, world_size=world_size, folders=folders)
    if problems or run_file is None:
        raise ConfigError(str(path), problems)
    return run_file


def load_toml(path: str | Path) -> dict[str, Any]:
    """Return the tables of a TOML file; a byte order mark, as some editors write it, is passed over.

    Raises:
        ConfigError: if it cannot be read, is no UTF-8 or is no TOML; with the line and column.
    """
    try:
        return _parsed(input_bytes(path, MOST_BYTES).decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(str(path), [f"there is no such file; it was looked for from {Path.cwd()}"]) from error
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            str(path), [f"is no UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"]
        ) from error
    except ValueError as error:
        raise ConfigError(str(path), [str(error)]) from error


def _parsed(text: str) -> dict[str, Any]:
    """Parse what can be parsed soon, and be walked over.

    Raises:
        ValueError: with the reason, which goes on from the file's name.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        # The parser looks at every beginning of a dotted key, so that a long one would keep it for minutes.
        if line.count(".") > MOST_DOTS and not line.lstrip().startswith("#"):
            raise ValueError(f"line {number} has {line.count('.'):,} dots; a key has at most {MOST_NESTED} names")
    return parse_toml(text)


def examine(
    tables: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    folders: Folders = "left out",
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
        return None, [*problems, *_table_problems(tables, error, problems, world_size, folders)]
    return run_file, [*problems, *_across(run_file, tables, world_size, folders)]


def _across(run_file: RunFile, tables: dict[str, Any], world_size: int | None, folders: Folders) -> list[str]:
    """Return what is wrong across the tables, and between them and what was written in `tables`."""
    found = check_on_any_world(run_file) if world_size is None else check(run_file, world_size)
    found += upcycling_problems(run_file, is_width_written=bool(tables["model"].get("ffn_hidden_size")))
    if folders == "left out":
        return found
    return [*found, *on_disk_problems(run_file, is_store_needed=folders == "needed")]


def _table_problems(
    tables: dict[str, Any], error: ValidationError, before: list[str], world_size: int | None, folders: Folders
) -> list[str]:
    """Return a line for each wrong key, then what the checks find in the rest."""
    errors = error.errors(include_url=False)
    if any(line.startswith("model.preset ") for line in before):  # its keys would be "missing" only for that reason
        errors = [entry for entry in errors if not (entry["type"] == "missing" and entry["loc"][0] == "model")]
    lines = [of_validation(entry) for entry in errors]
    for entry in errors:
        _leave_out(tables, entry["loc"])
    rest, stood_in = _with_stand_ins(tables)
    if rest is None:
        return lines
    # What is said about a key that is wrong, or about the one it was meant to be, follows from another value than the
    # user's. A model without its table or preset says nothing about the user's at all.
    said = _with_derived({*_keys_in(" ".join(LISTING.split(line)[0] for line in lines)), *stood_in}, tables)
    is_model_known = "model" not in stood_in and not any(line.startswith("model.preset ") for line in before)
    return [
        *lines,
        *(
            line
            for line in _across(rest, tables, world_size, folders)
            if not _keys_in(line) & said and (is_model_known or "model." not in line)
        ),
    ]


def _with_derived(wrong: set[str], tables: dict[str, Any]) -> set[str]:
    """Return the wrong keys, and those whose value is derived from a wrong one because the user gave none."""
    model = tables["model"]
    derived = {
        key
        for key, sources in DERIVED_FROM.items()
        if not model.get(key.removeprefix("model.")) and not wrong.isdisjoint(sources)
    }
    return wrong | derived


def _with_stand_ins(tables: dict[str, Any]) -> tuple[RunFile | None, set[str]]:
    """Return the RunFile with something in the place of each key that must be there and is not, and those keys."""
    stood_in: set[str] = set()
    for _ in range(3):  # a table, the table in it, and the keys of that
        try:
            return RunFile.model_validate(tables), stood_in
        except ValidationError as error:
            for entry in error.errors(include_url=False):
                key = dotted(entry["loc"])
                field = field_of(key)
                if entry["type"] != "missing" or "[" in key:
                    return None, stood_in
                _put(tables, key.split("."), STAND_INS.get(field.annotation, 1) if field else {})
                stood_in.add(key)
    return None, stood_in


def _put(tables: dict[str, Any], path: list[str], value: object) -> None:
    for name in path[:-1]:
        tables = tables[name]
    tables[path[-1]] = value


def _keys_in(text: str) -> set[str]:
    return set(re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+\b", text))


def _leave_out(tables: Any, location: Sequence[str | int]) -> None:
    """Delete the key at fault, if it is there; of a list, the whole: all of train.batch_ramp for its first entry."""
    path: list[str] = []
    for at in location:
        if isinstance(at, int):
            break
        path.append(at)
    for name in path[:-1]:
        tables = tables.get(name) if isinstance(tables, dict) else None
    if isinstance(tables, dict):
        tables.pop(path[-1], None)
