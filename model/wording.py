"""The words for a key that is wrong: `key = value: rule; way out`, in a run file and in Python alike.

Nothing here knows which keys there are.
"""

import difflib
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TYPE_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text, in quotes",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list, in brackets",
    "model_type": "must be a table",
    "finite_number": "must be a finite number",
}

# pydantic's name of a bound, in words; {0} is the bound.
BOUND_RULES = {
    "greater_than": ("gt", "must be above {0}"),
    "greater_than_equal": ("ge", "must be at least {0}"),
    "less_than": ("lt", "must be below {0}"),
    "less_than_equal": ("le", "must be at most {0}"),
}


def problem(key: str, value: object, rule: str, way_out: str = "") -> str:
    """Return one line: `key = value: rule; way out`."""
    return f"{key} = {shown(value)}: {rule}" + (f"; {way_out}" if way_out else "")


def shown(value: object) -> str:
    """Return a value as it stands in TOML, cut short where it is long."""
    if isinstance(value, bool | str):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key} = {shown(inner)}" for key, inner in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(shown(inner) for inner in value) + "]"
    elif isinstance(value, int) and value.bit_length() > 4096:  # str() has a limit, and nobody reads so many digits
        text = f"a number of about {round(value.bit_length() * 0.30103):,} digits"
    else:
        text = str(value)
    return cut_short(text)


def cut_short(text: str) -> str:
    """Return the beginning of a text that is too long for a line."""
    return text if len(text) <= 80 else text[:77] + "..."


def closest(word: str, among: Iterable[str]) -> str | None:
    """Return the one of `among` that the user most likely meant, or None if nothing is near."""
    by_lower = {name.lower(): name for name in among}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def dotted(location: Sequence[str | int]) -> str:
    """Return pydantic's location as the user would write it: `train.batch_ramp[0].samples`."""
    text = ""
    for at in location:
        text += f"[{at}]" if isinstance(at, int) else f".{at}" if text else at
    return text


def no_such_key(table: str, key: str, names: Iterable[str], meant: str | None) -> str:
    """Return the line for a key that a table has not: what it may have meant, and what there is."""
    fault, listing = f"{table}.{key}: no such key", f"[{table}] has: {', '.join(names)}"
    return f"{fault}; did you mean {meant}? {listing}" if meant else f"{fault}; {listing}"


def not_one_of(key: str, value: object, choices: Sequence[Any]) -> str:
    """Return the line for a value that is none of those that there are."""
    near = closest(value, choices) if isinstance(value, str) else None
    listed = "[" + ", ".join(shown(choice) for choice in choices) + "]"  # whole, however long: it is the way out
    return problem(key, value, f"must be one of {listed}", f"did you mean {shown(near)}?" if near else "")


def choices_of(annotation: Any) -> Iterable[str]:
    """Yield the values of every Literal within an annotation."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
    else:
        for inner in typing.get_args(annotation):
            yield from choices_of(inner)


def out_of_bounds(key: str, value: object, kind: str, bound: object, *, is_whole: bool) -> str:
    """Return the line for a number beyond its bound, by pydantic's name of the fault."""
    name, rule = BOUND_RULES[kind]
    if isinstance(value, int) and bound == 0 and name == "gt" and is_whole:
        rule = "must be at least 1"
    return problem(key, value, rule.format(bound))


def of_type(key: str, value: object, kind: str, message: str) -> str:
    """Return the line for a value of the wrong type, by pydantic's name of the fault and its own words for it."""
    rule = TYPE_RULES.get(kind, message[:1].lower() + message[1:])
    return problem(key, value, rule, unquoted(value) if kind in ("int_type", "float_type", "bool_type") else "")


def unquoted(value: object) -> str:
    """Return the way out when the value would be right without its quotes."""
    if not isinstance(value, str):
        return ""
    try:
        float(value)
    except ValueError:
        return "" if value.lower() not in ("true", "false") else f"write {value.lower()} without quotes"
    return f"write {value} without quotes"
