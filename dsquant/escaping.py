"""Words of others on their way into a page or a terminal: names of models, files and tensors, prompts, messages.

Each medium has one place where text enters it, and there it is made to show as what it is: JSON and
Prometheus by their writers, HTML, Markdown and terminals by what is here (rich escapes what notebooks show).
"""

import re
from html import escape

# Characters that a terminal obeys but line feed and tabulator, those that turn the order of others round, and bytes of
# a name that are no text.
_OBEYED = [*range(9), *range(11, 32), *range(0x7F, 0xA0)]
_TURNING = [0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_NO_TEXT = range(0xD800, 0xE000)
_UNPRINTABLE = dict.fromkeys([*_OBEYED, *_TURNING, *_NO_TEXT], "\N{REPLACEMENT CHARACTER}")
# What begins a construct of Markdown or HTML wherever it stands. References never begin one themselves.
_MARKS = {ord(mark): f"&#{ord(mark)};" for mark in "&<\\`*$~"}
# A bracket that makes a link of the one before; a low line at the edge of a word, which emphasizes.
_BRACKET = re.compile(r"\](?=[(\[:])")
_EDGE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")


def printable(text: str) -> str:
    """Replaces what a terminal would obey instead of showing it.

    Args:
        text: any text.

    Returns:
        The text, as long as before.
    """
    return text.translate(_UNPRINTABLE)


def html(text: str) -> str:
    """Makes text show in HTML as it is.

    Args:
        text: any text.

    Returns:
        HTML without tags, also for an attribute in quotes.
    """
    return escape(printable(text))


def markdown(text: str) -> str:
    """Makes text show in Markdown as it is, on one line.

    Args:
        text: any text.

    Returns:
        Markdown that holds no HTML, link, image or emphasis of the text's own.
    """
    text = printable(re.sub(r"[\r\n]+", " ", text)).translate(_MARKS)
    return _EDGE.sub("&#95;", _BRACKET.sub("&#93;", text))


def markdown_cell(text: str) -> str:
    """As `markdown`, inside a table.

    Args:
        text: any text.

    Returns:
        Markdown of one cell.
    """
    return markdown(text).replace("|", "\\|")


def counted(number: int, noun: str) -> str:
    """Returns `1 file`, `2 files`: a number with its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
