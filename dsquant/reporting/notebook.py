"""Shows results as the same tables in a terminal, from `print` and in a notebook."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsquant.escaping import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
# Notebooks would wrap the lines, or set them in the font of their text.
MONOSPACE = (
    "white-space: pre; overflow-x: auto; line-height: 1.2; "
    "font-family: ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
)

WIDTH = 100
"""Columns of tables and texts: a notebook's page on GitHub, or exported, is not wider."""


class Shown(ABC):
    """A result that `print` and a notebook show as the tables of the command line."""

    @abstractmethod
    def tables(self) -> Iterable[Any]:
        """Yields rich's renderables of the result."""

    def __str__(self) -> str:
        return as_text(self.tables())

    def _repr_html_(self) -> str:
        return as_html(self.tables())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Lets IPython show the tables as text too, not all fields, where it can show no HTML."""
        return {"text/plain": str(self)}


def table_of(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[Any]] = (), left: int = 1, **style: Any
) -> "Table":
    """Returns a table for rich, the first `left` columns left-justified, the others right-justified."""
    from rich.table import Table

    table = Table(title=title, **style)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def narrow_table(title: str, headings: Sequence[str], left: int = 1) -> "Table":
    """Returns an empty table without outer borders, for 80 columns."""
    from rich.box import SIMPLE_HEAD

    style = {"title_justify": "left", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    return table_of(title, headings, (), left, **style)


def plain_console(**options: Any) -> "Console":
    """Returns a rich console that shows text as it is: foreign names may look like rich's markup, or control a
    terminal.
    """
    from rich.console import Console

    console = Console(markup=False, emoji=False, **options)
    hook: Any = _Printable()
    console.push_render_hook(hook)
    return console


class _Printable:
    """Looks through all that a console is to render."""

    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        return [_Checked(one) for one in renderables]


@dataclass(frozen=True)
class _Checked:
    """A renderable without control characters, except those of rich itself."""

    inner: Any

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.segment import Segment

        for part in console.render(self.inner, options):
            yield part if part.control else Segment(printable(part.text), part.style)


def as_text(renderables: Iterable[Any], width: int = WIDTH) -> str:
    """Renders rich's tables and texts as plain text without colours, `width` columns wide."""
    console = plain_console(
        file=io.StringIO(), width=width, force_jupyter=False, force_terminal=False, color_system=None
    )
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable, crop=False)
    return capture.get().rstrip()


def as_html(renderables: Iterable[Any]) -> str:
    """Renders rich's tables and texts as HTML with inline styles."""
    console = plain_console(record=True, file=io.StringIO(), width=WIDTH, force_jupyter=False)
    for renderable in renderables:
        console.print(renderable)
    return console.export_html(inline_styles=True, code_format=f'<pre style="{MONOSPACE}">{{code}}</pre>')
