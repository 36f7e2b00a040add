"""`key=value` on the command line: changes to a run file's tables before they are looked at.

    train.steps=200  run.name=second-try  optimizer.betas=[0.9,0.99]  'model.bias=["q","k"]'

A value is TOML; a word that is none, such as second-try, is text. So is any value of a key that holds text: run.name=7
needs no quotes.
"""

import sys
import tomllib
from collections.abc import Sequence
from typing import Any

from meshwright.launcher.runfile.input_file import MOST_NESTED, nesting
from meshwright.launcher.runfile.keys import all_keys, field_of, fields
from meshwright.launcher.runfile.keys import tables as tables_by_name
from meshwright.launcher.runfile.messages import cut_short, shown, suggestion

EXAMPLE = "key=value, such as train.steps=100"
# The longest key of a run file has 3 names, model.moe.top_k; a wrong one of a few more is told as unknown.
MOST_NAMES = 8
TOO_DEEP = f"has lists or tables nested too deep; at most {MOST_NESTED} within one another would fit"


def apply_overrides(tables: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the tables with the overrides laid over them, and what is wrong with the overrides themselves.

    A later override of the same key wins. Whether a key exists and its value fits is for the tables to say.
    """
    changed = _copy(tables)
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key, text = key.strip(), text.strip()
        if fault := _key_fault(key, text) if equals and all(key.split(".")) else "an override is written " + EXAMPLE:
            problems.append(f"{cut_short(override)}: {fault}")
            continue
        try:
            value = parse_value(key, text)
        except ValueError as error:
            problems.append(f"{key} = {cut_short(text)}: {error}")
            continue
        problems += _put(changed, key.split("."), value)
    return changed, problems


def _key_fault(key: str, text: str) -> str:
    """Return why no value can be set at a key, "" if one can; whether the key exists is not looked at."""
    if key in tables_by_name():
        names = fields(tables_by_name()[key])
        way_out = f"; its keys are set one by one, such as {key}.{next(iter(names))}=..." if names else ""
        return f"{key} is a table{way_out}; [{key}] has: {', '.join(names)}"
    if "." not in key:
        meant = suggestion("", key) or next((known for known in all_keys() if known.endswith(f".{key}")), None)
        question = f"; did you mean {meant}={cut_short(text)}?" if meant else ""
        return f"the key of an override is written with its table{question}"
    names_in_key = key.count(".") + 1
    return f"the key has {names_in_key:,} names; at most {MOST_NAMES} would fit" if names_in_key > MOST_NAMES else ""


def parse_value(key: str, text: str) -> object:
    """Return the value that a piece of the command line stands for.

    Raises:
        ValueError: if it begins like a list, table or quoted text, and is none; or has more than one line, of which
            TOML would take the others for further keys.
    """
    field = field_of(key)
    if len(text.splitlines()) > 1:
        raise ValueError("must be one line; give each key by itself")
    try:
        value: object = parse_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        # A pattern may begin with a bracket; text that begins with a quote was meant to be TOML, and is not closed.
        is_text = field is not None and field.annotation is str and text[:1] not in ('"', "'")
        if text[:1] in ("[", "{", '"', "'") and not is_text:
            raise ValueError(f"{error}".replace("is no TOML", "is no TOML value")) from error
        return text
    if field is not None and field.annotation is str and not isinstance(value, str):
        return text
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML whose values can be walked over.

    Raises:
        ValueError: if it is none, or beyond what Python parses; the reason goes on from a file's or a key's name.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise tomllib.TOMLDecodeError(f"is no TOML: {error}") from error
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError:  # Python's limit to the digits of a number, the only other
        raise ValueError(f"has a number of more than {sys.get_int_max_str_digits():,} digits") from None
    if nesting(tables) > MOST_NESTED:
        raise ValueError(TOO_DEEP)
    return tables


def _put(tables: dict[str, Any], path: list[str], value: object) -> list[str]:
    """Set the value at `path`, making the tables on the way; return the problem if one of them is no table."""
    at = tables
    for depth, name in enumerate(path[:-1], start=1):
        inner = at.setdefault(name, {})
        if not isinstance(inner, dict):
            return [f"{'.'.join(path)}: {'.'.join(path[:depth])} = {shown(inner)} is no table, it has no keys"]
        at = inner
    at[path[-1]] = value
    return []


def _copy(tables: dict[str, Any]) -> dict[str, Any]:
    """Copy the nested tables; the values in them are never changed."""
    return {name: _copy(value) if isinstance(value, dict) else value for name, value in tables.items()}
