"""`key=value` on the command line: changes to a run file's tables before they are looked at.

    train.steps=200  run.name=second-try  optimizer.betas=[0.9,0.99]  'model.bias=["q","k"]'

A value is TOML; a word that is none, such as second-try, is text. So is any value of a key that holds text: run.name=7
needs no quotes.
"""

import tomllib
from collections.abc import Sequence
from typing import Any

from meshwright.launcher.runfile.keys import all_keys, field_of
from meshwright.launcher.runfile.messages import shown, suggestion


def apply_overrides(tables: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the tables with the overrides laid over them, and what is wrong with the overrides themselves.

    A later override of the same key wins. Whether a key exists and its value fits is for the tables to say.
    """
    changed = _copy(tables)
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            problems.append(f"{override}: an override is written key=value, such as train.steps=100")
            continue
        if "." not in key:
            meant = suggestion("", key) or next((known for known in all_keys() if known.endswith(f".{key}")), None)
            question = f"; did you mean {meant}={text}?" if meant else ""
            problems.append(f"{override}: the key of an override is written with its table{question}")
            continue
        try:
            value = parse_value(key, text.strip())
        except ValueError as error:
            problems.append(f"{key} = {text}: {error}")
            continue
        problems += _put(changed, key.split("."), value)
    return changed, problems


def parse_value(key: str, text: str) -> object:
    """Return the value that a piece of the command line stands for.

    Raises:
        ValueError: if it begins like a list, table or quoted text, and is none.
    """
    field = field_of(key)
    try:
        value: object = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ("[", "{", '"', "'"):
            raise ValueError(f"is no TOML value: {error}") from error
        return text
    if field is not None and field.annotation is str and not isinstance(value, str):
        return text
    return value


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
