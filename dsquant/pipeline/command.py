"""The command that makes an output, from the recipe in its record."""

import shlex
from collections.abc import Collection, Mapping
from typing import Any

from dsquant.options import spelling_of
from dsquant.recipes import AwqOptions, GgufOptions, Recipe, gguf_recipe


def command_of(recipe: Mapping[str, Any]) -> str | None:
    """Returns the command line of a record's recipe without `--output`, with all that is not a default; None of an
    output that took scales from another."""
    if recipe.get("scales_from"):
        return None
    return _gguf(recipe) or _awq(recipe)


def _gguf(recipe: Mapping[str, Any]) -> str | None:
    """Of `dsquant gguf`; None where that has not all the options."""
    kind, _, type_name = recipe["to"][0].partition(":")
    if kind != "gguf" or len(recipe["to"]) > 1:
        return None
    asked: dict[str, Any] = {"type": type_name}
    asked |= {"imatrix": recipe["imatrix"]} if recipe.get("imatrix") else {}
    asked |= {"mtp": "keep"} if recipe["mtp"] == "quantize" else {}
    asked |= {"scales": False} if gguf_recipe(**asked, output=".").steps and not recipe["steps"] else {}
    differing = _differing(recipe, gguf_recipe(**asked, output="."))
    return (
        _line("gguf", recipe["model"], asked | differing)
        if differing.keys() <= GgufOptions.model_fields.keys()
        else None
    )


def _awq(recipe: Mapping[str, Any]) -> str:
    asked = {name: recipe[name] for name in ("to", "preset")}
    return _line("awq", recipe["model"], asked | _differing(recipe, Recipe.checked(**asked, output=".")))


def _differing(recipe: Mapping[str, Any], base: Recipe) -> dict[str, Any]:
    """Returns the fields of a recipe that another has not, but for the model."""
    plain = base.lasting() | {"model": recipe["model"]}
    return {name: value for name, value in recipe.items() if value != plain.get(name) and value is not None}


def _line(command: str, model: str, options: Mapping[str, Any]) -> str:
    words = ["dsquant", command, model]
    for name, field in (AwqOptions.model_fields | GgufOptions.model_fields).items():
        if name in options:
            flags = spelling_of(field).flags
            option = (field.serialization_alias or name).replace("_", "-")
            words += _words(flags if flags.startswith("--") else f"--{option}", options[name])
    return shlex.join(words)


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        yes, _, no = flag.partition("/")
        return [yes if value else no or f"--no-{yes[2:]}"]
    if flag == "--steps":
        return [flag, ",".join(value) or "none"]
    if isinstance(value, Collection) and not isinstance(value, str):
        return [word for one in value or ("none",) for word in (flag, one)]
    return [flag, str(value)]
