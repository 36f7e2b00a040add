"""Every key that a run file may have, found by walking the tables: `learning_rate.peak` -> its field.

Messages, overrides and docs/run-file.md read this walk, so that none of them has a list of its own to keep.
"""

import typing
from collections.abc import Iterator
from functools import cache
from types import MappingProxyType, UnionType

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from meshwright.launcher.runfile.tables import RunFile


@cache
def tables() -> MappingProxyType[str, type[BaseModel]]:
    """Return each table by the name in its brackets, `model.moe` behind `model`, in the order of RunFile."""
    return MappingProxyType(dict(_walk(RunFile, "")))


@cache
def fields(table: type[BaseModel]) -> MappingProxyType[str, FieldInfo]:
    """Return a table's fields by the key that a user writes, tables within it left out."""
    return MappingProxyType(
        {field.alias or name: field for name, field in table.model_fields.items() if table_in(field) is None}
    )


@cache
def all_keys() -> tuple[str, ...]:
    """Return every key with its table, `train.steps`, in the order of the tables."""
    return tuple(f"{name}.{key}" for name, table in tables().items() for key in fields(table))


def field_of(dotted: str) -> FieldInfo | None:
    """Return the field of `train.steps`, or None if there is no such key."""
    name, _, key = dotted.rpartition(".")
    table = tables().get(name)
    return fields(table).get(key) if table else None


def table_in(field: FieldInfo) -> type[BaseModel] | None:
    """Return the table that a field holds, also one that may be left out; None if the field is a plain value."""
    may_be_left_out = typing.get_origin(field.annotation) in (typing.Union, UnionType)
    kinds = typing.get_args(field.annotation) if may_be_left_out else (field.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def entry_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the table that a field holds a list of, `train.batch_ramp`; None if it is no such list."""
    if typing.get_origin(field.annotation) is not tuple:
        return None
    kind = typing.get_args(field.annotation)[0]
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _walk(table: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in table.model_fields.items():
        inner = table_in(field)
        if inner is not None:
            yield prefix + name, inner
            yield from _walk(inner, f"{prefix}{name}.")
