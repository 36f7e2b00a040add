"""Shapes by name: `preset = "llama3-8b"` in a run file, `preset("llama3-8b", num_layers=2)` in Python.

    {dense,moe,mamba,hybrid}-{tiny,small,medium,large,1b,8b}   of ours            preset_tables/ours.py
    gpt-{tiny,small,medium}   switch_all                       of ours            preset_tables/ours.py
    llama* qwen3-* olmo2-* gemma-* gpt2* bloom-*               public, dense      preset_tables/dense.py
    mixtral-* qwen3-*-a* olmoe-* deepseek-* qwen3-next-*       public, experts    preset_tables/experts.py
    mamba-2.8b mamba2-2.7b granite4-h-* nemotron-h-8b          public, a state    preset_tables/state.py

A preset is a table of [model] keys; a key that a user writes beside it wins. What of the preset nothing reads any more
is left out: the heads of `dense-small` where the user's pattern is "M-". What the user wrote himself stays, and is
refused (kinds/unread.py). `vocab_size` is the tokenizer's where a preset names none. docs/models.md lists all presets
with their numbers of weights.
"""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from meshwright.model.config import ModelConfig
from meshwright.model.kinds.table import ALL
from meshwright.model.kinds.unread import idle_keys
from meshwright.model.preset_tables.dense import DENSE
from meshwright.model.preset_tables.experts import EXPERTS
from meshwright.model.preset_tables.ours import OURS
from meshwright.model.preset_tables.state import STATE
from meshwright.model.wording import (
    BOUND_RULES,
    choices_of,
    closest,
    dotted,
    no_such_key,
    not_one_of,
    of_type,
    out_of_bounds,
)

Keys = Mapping[str, Any]

PRESETS: Mapping[str, Keys] = {**OURS, **DENSE, **EXPERTS, **STATE}


def with_preset(table: Keys) -> dict[str, Any]:
    """Return the [model] keys with those of the preset that they name laid beneath; keys within its tables likewise.

    Keys of the preset that nothing reads beside the given ones are left out.

    Raises:
        ValueError: if there is no preset of that name.
    """
    name = table.get("preset", "")
    if name == "":
        return dict(table)
    if name not in PRESETS:
        near = closest(str(name), PRESETS)
        meant = f"; did you mean {near}?" if near else ""
        raise ValueError(f"there is no such preset; the presets are: {', '.join(PRESETS)}{meant}")
    merged, before = _laid_over(PRESETS[name], table), None
    while merged != before:  # without num_heads a head_dim that they made is idle too
        before = dict(merged)
        for key in _idle(merged, PRESETS[name]):
            _leave_out(merged, key, table)
    return merged


def _idle(merged: dict[str, Any], beneath: Keys) -> list[str]:
    """Return the tables and keys that nothing reads; what is wrong in itself is taken as the preset has it."""
    try:
        model = ModelConfig.model_validate(merged)
    except ValidationError as error:
        wrong = {str(entry["loc"][0]) for entry in error.errors(include_url=False) if entry["loc"]}
        sound = {key: value for key, value in merged.items() if key not in wrong}
        try:
            model = ModelConfig.model_validate({key: beneath[key] for key in wrong & beneath.keys()} | sound)
        except ValidationError:
            return []  # told when the tables are read
    if not model.layer_kinds:
        return []
    unused = {kind.table for kind in ALL if kind.table} - {kind.table for kind in model.part_kinds}
    return [*sorted(unused), *(idle.key for idle in idle_keys(model))]


def _leave_out(merged: dict[str, Any], key: str, written: Keys) -> None:
    """Leave a key out unless the user wrote it: "num_heads", "moe.bias_rate", the letter of "bias.q"."""
    name, _, inner = key.partition(".")
    own = written.get(name)
    if not inner:
        if name not in written:
            merged.pop(name, None)
    elif name == "bias":
        if name not in written:
            merged[name] = tuple(letter for letter in merged[name] if letter != inner)
    elif isinstance(merged.get(name), Mapping) and not (isinstance(own, Mapping) and inner in own):
        merged[name] = {at: value for at, value in merged[name].items() if at != inner}


def _laid_over(beneath: Keys, above: Keys) -> dict[str, Any]:
    merged = {**beneath, **above}
    for key, table in beneath.items():
        if isinstance(table, Mapping) and isinstance(above.get(key), Mapping):
            merged[key] = {**table, **above[key]}
    return merged


def preset(name: str, **changes: Any) -> ModelConfig:
    """Return a preset's config, with some keys changed: `preset("moe-tiny", vocab_size=512, moe={"top_k": 1})`.

    Raises:
        ValueError: if there is no such preset or key, or the changed sizes make no model: naming every reason.
    """
    try:
        config = ModelConfig.model_validate(with_preset({**changes, "preset": name}))
    except ValidationError as error:
        raise ValueError("\n".join(_line_of(entry) for entry in error.errors(include_url=False))) from None
    if problems := config.problems():
        raise ValueError("\n".join(problems))
    return config


def _line_of(error: Mapping[str, Any]) -> str:
    """Return the line for one of pydantic's errors, as `check` words those of a run file."""
    location, kind, value = error["loc"], error["type"], error["input"]
    key = dotted(("model", *location))
    table, field = _at(location)
    if kind == "extra_forbidden":
        names, (of, _, last) = list(table.model_fields), key.rpartition(".")
        near = closest(last, names)
        return no_such_key(of, last, names, f"{of}.{near}" if near else None)
    if kind == "missing":
        return f"{key}: is missing" + (f"; {field.description}" if field and field.description else "")
    if kind == "literal_error" and field:
        return not_one_of(key, value, list(choices_of(field.annotation)))
    if kind in BOUND_RULES:
        is_whole = field is None or "float" not in str(field.annotation)
        return out_of_bounds(key, value, kind, error["ctx"][BOUND_RULES[kind][0]], is_whole=is_whole)
    return of_type(key, value, kind, error["msg"])


def _at(location: tuple[str | int, ...]) -> tuple[type[BaseModel], FieldInfo | None]:
    """Return the table that a key of [model] stands in, and its field if there is one."""
    table: type[BaseModel] = ModelConfig
    *within, last = [at for at in location if isinstance(at, str)]
    for name in within:
        found = get_args(table.model_fields[name].annotation) if name in table.model_fields else ()
        table = next((each for each in found if isinstance(each, type) and issubclass(each, BaseModel)), table)
    return table, table.model_fields.get(last)
