"""How results look in a notebook: the terminal's tables as HTML."""

import io
from collections.abc import Iterable
from typing import Any


def as_html(renderables: Iterable[Any]) -> str:
    """Renders what rich can print.

    Args:
        renderables: tables and texts.

    Returns:
        HTML with its styles inside.
    """
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=110)
    for renderable in renderables:
        console.print(renderable)
    return console.export_html(inline_styles=True, code_format="<pre style='line-height:1.2'>{code}</pre>")
