"""An option is declared once, as a field of a pydantic model; this module reads it for every place that offers it.

    class Sampling(Options):
        seq_len: int = Field(512, ge=8, description="Tokens of a sample.")

is `--seq-len` of the command line (dsquant/cli/fields.py), `seq_len=` of the Python API with its line in the docstring
(`documented`), and `seq_len:` of a recipe file, whose sections inherit from the same models.
"""

import difflib
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, Union, get_args, get_origin

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from dsquant.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", bound="Options")


@dataclass(frozen=True)
class Spelling:
    """How an option is written where its name, type and default do not say so."""

    flags: str = ""
    """The command line's, such as `--symmetric/--asymmetric` or `-o`, which then stands beside the name's own."""
    metavar: str | None = None
    default: str = ""
    """The default in words."""


@dataclass(frozen=True)
class Accepts:
    """What a caller may give for a field that holds something narrower."""

    type: Any


# Nothing is larger than this.
_MOST_BYTES = 2**60
# Kinds of pydantic's problems -> what is wrong, in the terms of whoever wrote the file.
_PROBLEMS = {
    "missing": "this key is needed",
    "tuple_type": "expected a list",
    "too_short": "the list is empty",
    "model_type": "expected keys and values",
    "model_attributes_type": "expected keys and values",
}


def parse_size(text: str) -> int:
    """Reads a size such as `16GiB`, `131GB` or `1000000`.

    Args:
        text: a number with an optional unit: B; KiB, MiB, GiB, TiB or K, M, G, T are powers of 1024, and KB, MB, GB, TB
            of 1000, as huggingface_hub and accelerate read them.

    Returns:
        Bytes.

    Raises:
        UsageError: where the text is not a size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT]?)(i?B?))?\s*", text, re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < _MOST_BYTES:
        raise UsageError(f"{text!r} is not a size; write it as 16GiB, 512MiB or a number of bytes")
    power = " KMGT".index((match[2] or " ").upper())
    return int(float(match[1]) * (1000 if (match[3] or "").upper() == "B" else 1024) ** power)


def format_size(num_bytes: float) -> str:
    """Writes a number of bytes for people: 11.9 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def text_of_path(value: Any) -> Any:
    """Reads a path as a text."""
    return str(value) if isinstance(value, Path) else value


def _texts(values: Any) -> Any:
    """Reads one text given without a list, and paths as texts."""
    values = (values,) if isinstance(values, str | Path) else values
    return tuple(map(text_of_path, values)) if isinstance(values, list | tuple) else values


def _texts_or_files(values: Any) -> Any:
    """Reads texts, and for @FILE the words of a file, so that records hold them and not its name."""
    values = _texts(values)
    if not isinstance(values, tuple):
        return values
    return tuple(word for text in values for word in (_words_of(text[1:]) if str(text).startswith("@") else [text]))


def _words_of(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; name a text file behind the @") from error


def _size(value: Any) -> Any:
    """Reads a size such as 16GiB."""
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except UsageError as error:
        raise ValueError(str(error)) from error


Size = Annotated[int, BeforeValidator(_size), Accepts(str | int)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts), Accepts(str | Path | Sequence[str | Path])]
TextsOrFiles = Annotated[tuple[str, ...], BeforeValidator(_texts_or_files), Accepts(str | Path | Sequence[str | Path])]


class Options(BaseModel):
    """Checked settings. A value of None stands for the default, as does a key that is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _none_is_the_default(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @classmethod
    def checked(cls, /, **values: Any) -> Self:
        """Builds the settings.

        Args:
            **values: those that differ from the defaults.

        Returns:
            The settings.

        Raises:
            UsageError: where an option is unknown or its value is not allowed.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise UsageError("; ".join(problem_text(problem, cls) for problem in error.errors())) from error


def options_of(*models: type[BaseModel]) -> dict[str, FieldInfo]:
    """Finds the options of models: the name that users know (the field's first alias, or its own) -> the field."""
    fields: dict[str, FieldInfo] = {}
    for model in models:
        for name, field in model.model_fields.items():
            alias = field.validation_alias
            fields[str(alias.choices[0]) if isinstance(alias, AliasChoices) else name] = field
    return fields


def taken(model: type[T], options: dict[str, Any]) -> T:
    """Moves a model's options out of a call's.

    Args:
        model: the model.
        options: name -> value; those of the model are removed.

    Returns:
        The model with these values.

    Raises:
        UsageError: where a value is not allowed.
    """
    return model.checked(**{name: options.pop(name) for name in options_of(model) if name in options})


def spelling_of(field: FieldInfo) -> Spelling:
    """Returns how an option is written."""
    return next((item for item in field.metadata if isinstance(item, Spelling)), Spelling())


def problem_text(problem: Mapping[str, Any], model: type[BaseModel], where: tuple[Any, ...] | None = None) -> str:
    """Tells one of pydantic's problems, and for an unknown key the nearest one that exists.

    Args:
        problem: one of `ValidationError.errors()`.
        model: the model that holds the key.
        where: the key's path for people; None takes the problem's own.

    Returns:
        `path: what is wrong`; of a whole model the problem alone.
    """
    path = problem["loc"] if where is None else where
    words = problem["msg"].removeprefix("Value error, ")
    words = _PROBLEMS.get(problem["type"], words)
    if problem["type"] == "extra_forbidden":
        known = sorted(options_of(model))
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        words = f"unknown key; did you mean {near[0]!r}?" if near else f"unknown key; there are {', '.join(known)}"
    return f"{'.'.join(map(str, path))}: {words}" if path else words


def documented(*models: type[BaseModel]) -> Callable[[F], F]:
    """Gives a function that takes `**options` the signature and the docstring of what it takes.

    Type checkers see the function as it is written; `inspect.signature`, `help` and notebooks see every option.

    Args:
        *models: whose fields are the options; the function's own parameters count where names are the same.

    Returns:
        A decorator. The line on `**options` in the docstring's Args gives way to one for each option.
    """
    fields = options_of(*models)

    def decorate(function: F) -> F:
        signature = inspect.signature(function, eval_str=False)
        own = [item for item in signature.parameters.values() if item.kind is not item.VAR_KEYWORD]
        added = [_parameter(name, field) for name, field in fields.items() if name not in signature.parameters]
        lines = [_documentation(item.name, fields[item.name]) for item in added]
        function.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        function.__doc__ = re.sub(r" +\*\*options: .*\n(?: {12}.*\n)*", "".join(lines), function.__doc__ or "")
        return function

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.is_required() else field.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=accepted(field))


def _documentation(name: str, field: FieldInfo) -> str:
    default = spelling_of(field).default
    words = field.description or ""
    words = words if words[1:2].isupper() else words[:1].lower() + words[1:]  # but for GPUs, YAML
    text = f"{name}: {words}" + (f" Default: {default}." if default else "")
    return textwrap.fill(text, 112, initial_indent=" " * 8, subsequent_indent=" " * 12) + "\n"


def accepted(field: FieldInfo) -> Any:
    """Returns the type of what a caller may give for a field."""
    return _accepted(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)


def _accepted(annotation: Any) -> Any:
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return next((item.type for item in metadata if isinstance(item, Accepts)), None) or _accepted(inner)
    if get_origin(annotation) in (Union, types.UnionType):
        return reduce(or_, map(_accepted, get_args(annotation)))
    return str | Path if annotation is Path else annotation
