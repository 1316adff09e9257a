"""Fields of models (dsquant/options.py) as options of commands."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import click

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo


class FieldsCommand(click.Command):
    """A command with an option for each field of models.

    They are added when they are needed: pydantic takes longer to import than `dsquant --help` may take.
    """

    def __init__(
        self,
        *arguments: Any,
        models: "Callable[[], Iterable[type[BaseModel]]]",
        own_first: bool = False,
        **settings: Any,
    ) -> None:
        """Takes click's arguments, a function that imports the models, and whether the other options precede the
        models'."""
        super().__init__(*arguments, **settings)
        self._models, self._own_first = models, own_first
        self._complete = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Returns the fields' options and the command's own parameters."""
        if not self._complete:
            from dsquant.options import options_of

            fields, own = options_of(*self._models()), {parameter.name for parameter in self.params}
            added = [_option(name, field) for name, field in fields.items() if name not in own]
            self.params = [*self.params, *added] if self._own_first else [*added, *self.params]
            self._complete = True
        return super().get_params(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Returns the words that belong to no parameter: none, since they are refused with what was meant."""
        given, ctx.allow_extra_args = list(args), True
        rest = super().parse_args(ctx, args)
        if rest and not ctx.resilient_parsing:
            hint = self._hint(ctx, given, rest[0])
            ctx.fail(f"Got unexpected extra argument{'s' * (len(rest) > 1)} ({' '.join(rest)}){hint}")
        return rest

    def _hint(self, ctx: click.Context, given: list[str], word: str) -> str:
        """Says which option a word was meant for: the one that it follows as a second value, or --output."""
        option = given[max(given.index(word) - 2, 0)]
        if any(option in parameter.opts and parameter.multiple for parameter in self.params):
            return f"; {option} takes one value at a time: add {option} {word}"
        return f"; name the output folder with --output {word}" if ctx.params.get("output", word) is None else ""


def _option(name: str, field: "FieldInfo") -> click.Option:
    """Builds a field's option; where the default is told in words, the model fills it in."""
    from dsquant.options import spelling_of

    spelling, value_type = spelling_of(field), _value_type(field)
    flag = f"--{name.replace('_', '-')}"
    flags = f"{flag}/--no-{flag[2:]}" if value_type is bool else flag
    written = [spelling.flags] if spelling.flags.startswith("--") else [flags, *spelling.flags.split()]
    settings = _settings(field, value_type)
    if spelling.default:
        words = f"{field.description}  [default: {spelling.default}]"
        return click.Option([name, *written], help=words, metavar=spelling.metavar, **settings)
    shown = {"default": field.default, "show_default": field.default is not False or "/" in written[0]}
    if field.default is None or field.default == () or field.is_required():
        shown = {}
    elif _is_text(field) and isinstance(field.default, int):  # a size
        shown["default"] = f"{field.default / 2**30:g}GiB"
    return click.Option([name, *written], help=field.description, metavar=spelling.metavar, **settings, **shown)


def _none_for_nothing(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> Any:
    return values or None


def _value_type(field: "FieldInfo") -> Any:
    """Finds what a field holds besides None."""
    annotation = field.annotation
    if type(None) in get_args(annotation):
        annotation = next(item for item in get_args(annotation) if item is not type(None))
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _is_text(field: "FieldInfo") -> bool:
    """Tells whether the model reads the value from a text."""
    from dsquant.options import accepted

    return str in get_args(accepted(field))


def _settings(field: "FieldInfo", value_type: Any) -> dict[str, Any]:
    """Finds click's settings for a type. A tuple of names is one text with commas, one of texts may be repeated."""
    if value_type is bool:
        return {"is_flag": True, **({"default": None} if field.default is None else {})}
    if get_origin(value_type) is Literal:
        return {"type": click.Choice(get_args(value_type))}
    if get_origin(value_type) is tuple:
        return {"multiple": True, "callback": _none_for_nothing} if get_args(value_type)[0] is str else {}
    if value_type is Path:
        return {"type": click.Path(path_type=Path)}
    if value_type in (int, float) and not _is_text(field):
        bounds = {name: getattr(item, name) for item in field.metadata for name in ("ge", "le") if hasattr(item, name)}
        ranged = click.IntRange if value_type is int else click.FloatRange
        return {"type": ranged(bounds.get("ge"), bounds.get("le")) if "ge" in bounds else value_type}
    return {}
