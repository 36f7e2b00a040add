"""What is generated from the tables: runs/schema.json for editors, and the list of keys in docs/run-file.md.

    python -m meshwright.launcher.runfile.schema     writes both anew; a test fails while they are behind the tables

It writes the tables of docs/models.md too (models_page.py).

A run file that begins with `#:schema schema.json` gets completion, documentation and red lines in editors with
Taplo (Even Better TOML).
"""

import json
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from meshwright.launcher.runfile.keys import entry_of, fields, tables
from meshwright.launcher.runfile.messages import shown
from meshwright.launcher.runfile.models_page import with_part, with_tables
from meshwright.launcher.runfile.tables import RunFile

BEGIN, END = "<!-- keys: generated, do not edit by hand -->", "<!-- end of keys -->"

# Bounds of a number, as pydantic's metadata names them, in the words of the list of keys.
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
# Bounds from here on only catch slips of the keyboard: a reader of the list does not need them.
BEYOND_USE = 2**14


def json_schema() -> str:
    """Return the schema of a run file as JSON text."""
    schema = RunFile.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    # With a preset, keys that must otherwise be there may be left out, also those of the experts.
    model, moe = schema["$defs"]["ModelConfig"], schema["$defs"]["MoeConfig"]
    whole_experts = {"properties": {"moe": {"required": moe.pop("required")}}}
    model["anyOf"] = [{"required": ["preset"]}, {"required": model.pop("required"), **whole_experts}]
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def key_list() -> str:
    """Return every key with its type, default and meaning, as Markdown."""
    return "\n".join(_section(name, table) for name, table in tables().items())


def with_key_list(page: str) -> str:
    """Return the page with the part between its two markers made anew.

    Raises:
        ValueError: if the page has lost its markers.
    """
    return with_part(page, BEGIN, END, key_list())


def _section(name: str, table: type[BaseModel]) -> str:
    rows = [
        f"### [{name}]",
        "",
        _one_line(table.__doc__),
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for key, field in fields(table).items():
        rows.append(_row(key, field))
        entry = entry_of(field)
        inner = fields(entry) if entry else {}
        rows += [_row(f"{key}[].{name}", of_entry) for name, of_entry in inner.items()]
    return "\n".join([*rows, ""])


def _row(key: str, field: FieldInfo) -> str:
    meaning = _one_line(field.description).replace("|", "\\|")
    return f"| `{key}` | {_type_of(field)} | {_default_of(field)} | {meaning} |"


def _type_of(field: FieldInfo) -> str:
    """Return a field's type and bounds in words."""
    annotation, bounds = field.annotation, field.metadata
    if field.default is None:  # may be left out: the type is the one beside None, and its bounds stand with it
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not type(None))
        if typing.get_origin(annotation) is typing.Annotated:
            annotation, *bounds = typing.get_args(annotation)
    limits = [
        f"{word} {getattr(bound, name)}"
        for bound in bounds
        for name, word in BOUNDS.items()
        if hasattr(bound, name) and getattr(bound, name) < BEYOND_USE
    ]
    text = _type_name(annotation)
    return text + (", " + ", ".join(limits) if limits else "")


def _type_name(annotation: Any) -> str:
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    if annotation in names:
        return names[annotation]
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{shown(choice)}`" for choice in inner)
    if origin is typing.Annotated:
        return _type_name(inner[0])
    if origin is tuple and inner[-1] is ...:
        return "list of tables" if isinstance(inner[0], type) else f"list of {_type_name(inner[0])}"
    if origin is tuple:
        return f"list of {len(inner)} numbers"
    raise AssertionError(f"the list of keys has no word for {annotation}")


def _default_of(field: FieldInfo) -> str:
    if field.default is None:
        return "may be left out"
    return "must be given" if field.default is PydanticUndefined else f"`{shown(field.default)}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def main() -> None:
    """Write the schema and the list of keys anew, into the folders beside this package's source."""
    root = Path(__file__).resolve().parents[2]
    (root / "runs" / "schema.json").write_text(json_schema(), encoding="utf-8")
    page = root / "docs" / "run-file.md"
    page.write_text(with_key_list(page.read_text(encoding="utf-8")), encoding="utf-8")
    page = root / "docs" / "models.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
