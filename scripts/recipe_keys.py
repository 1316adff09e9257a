"""Writes the tables of docs/recipes.md: every key of a recipe, from the models that read it.

python scripts/recipe_keys.py; tests/releases/test_recipe.py says when it is due.
"""

import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dsquant.options import accepted, options_of, spelling_of
from dsquant.releases.recipe import (
    KINDS,
    AwqStep,
    CalibrationPart,
    EvaluateStep,
    GgufStep,
    OnFailure,
    ReleaseRecipe,
)

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
TABLES: dict[str, type[BaseModel]] = {
    "The file": ReleaseRecipe,
    "`calibration`": CalibrationPart,
    "An entry of `quantize` with `to`": AwqStep,
    "An entry of `quantize` with `type`": GgufStep,
    "`evaluate`": EvaluateStep,
    "`on_failure`": OnFailure,
}
BLOCK = re.compile(r"(?<=<!-- recipe-keys: begin -->\n).*(?=<!-- recipe-keys: end -->)", re.DOTALL)
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", Sequence: "list"}


def page() -> str:
    """Returns the page with its tables as they should be."""
    tables = "".join(f"\n### {title}\n\n{table(model)}" for title, model in TABLES.items())
    found, count = BLOCK.subn(lambda _: f"{tables}\n", PAGE.read_text())
    assert count == 1, f"{PAGE} has no place for the tables"
    return found


def table(model: type[BaseModel]) -> str:
    """Returns a table of a mapping's keys; those that are needed come first."""
    fields = options_of(model)
    rows = [(name, *_row(name, field)) for name, field in sorted(fields.items(), key=lambda item: not _needed(*item))]
    lines = (f"| `{name}` | {kind} | {default} | {meaning} |\n" for name, kind, default, meaning in rows)
    return "| key | value | default | meaning |\n|---|---|---|---|\n" + "".join(lines)


def _needed(name: str, field: FieldInfo) -> bool:
    return field.is_required() or name in KINDS


def _row(name: str, field: FieldInfo) -> tuple[str, str, str]:
    default = "needed" if _needed(name, field) else spelling_of(field).default or _default(field)
    return kind(field), default, re.sub(r"--([a-z-]+)", r"`\1`", (field.description or "").replace("|", "\\|"))


def kind(field: FieldInfo) -> str:
    """Returns what a key holds, in words."""
    parts = list(dict.fromkeys(_parts(accepted(field))))
    if "text" in parts and "whole number" in parts:  # a Size
        return "size"
    if "text" in parts and ("path" in parts or "list" in parts):
        parts = [part for part in parts if part not in (("path",) if "list" in parts else ("text",))]
    bound = next((f", at least {item.ge}" for item in field.metadata if getattr(item, "ge", None)), "")
    return " or ".join(parts) + bound


def _parts(annotation: Any) -> Iterator[str]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    elif origin is Literal:
        yield ", ".join(f"`{value}`" for value in get_args(annotation))
    elif origin in (tuple, list):
        yield "list of entries"
    elif origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        yield "mapping"
    elif annotation is not type(None):
        yield WORDS[origin or annotation]


def _default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    if kind(field) == "size" and isinstance(value, int):
        return f"{value / 2**30:g}GiB"
    return "none" if value is None else str(value)


if __name__ == "__main__":
    PAGE.write_text(page())
