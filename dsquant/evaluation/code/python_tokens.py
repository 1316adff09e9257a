"""Splits Python source into tokens and parses it, also where it is truncated or broken.

Everything here takes a `prefix`: the text that both sides of a comparison begin with (the prompt). It is lexed and
parsed with the text, so that a completion that begins in the middle of a function makes sense, and is left out of the
result, so that no side is credited with the prompt.
"""

import ast
import io
import re
import tokenize
import warnings

# ast.parse accepts deeper trees than Python code that walks them by recursion does.
DEEPEST_TREE = 200
DROPPED = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER, tokenize.ENCODING)
STRUCTURE = {tokenize.INDENT: "<indent>", tokenize.DEDENT: "<dedent>", tokenize.NEWLINE: "<newline>"}

Place = tuple[int, int]
"""Line from 1 and column from 0, in characters."""


def normalized(text: str) -> str:
    """Returns the text with line ends as `\\n`."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def end_of(prefix: str) -> Place:
    """Returns the place where a text ends."""
    return prefix.count("\n") + 1, len(prefix) - (prefix.rfind("\n") + 1)


def python_tokens(text: str, prefix: str = "") -> list[str]:
    """Splits Python into its tokens, by the standard library's lexer; returns those that end after the prefix.

    Ends of lines and beginnings and ends of blocks are tokens of their own, so that indentation counts by its structure
    and not its width. Comments are left out. From where the lexer refuses a text, it is split into words and signs,
    each line's indentation with its width; so every text has tokens, and a truncated one keeps those before the cut.
    """
    prefix, text = normalized(prefix), normalized(text)
    if not text:
        return []
    source, boundary = prefix + text, end_of(prefix)
    tokens: list[str] = []
    last: Place = (1, 0)
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            last = token.end
            # A block's end has no extent: it belongs to the text after it.
            behind = token.end >= boundary if token.type == tokenize.DEDENT else token.end > boundary
            word = STRUCTURE.get(token.type, token.string).strip()
            if behind and word and token.type not in DROPPED:
                tokens.append(word)
    except (tokenize.TokenError, SyntaxError):
        start = max(_offset(source, last), len(prefix))
        tokens += [_word(found) for found in re.findall(r"\n[ \t]*(?=\S)|\w+|[^\w\s]", source[start:])]
    return tokens


def _offset(source: str, place: Place) -> int:
    lines = source.split("\n")
    return min(len(source), sum(len(line) + 1 for line in lines[: place[0] - 1]) + place[1])


def _word(found: str) -> str:
    return f"<line {len(found) - 1}>".replace(" ", "") if found.startswith("\n") else found


def parsed(source: str) -> ast.Module | None:
    """Returns the syntax tree of a program; None where it is not Python, or is nested deeper than 200 levels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as invalid escapes: not our code
            tree = ast.parse(normalized(source))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return tree if _depth(tree) <= DEEPEST_TREE else None


def _depth(tree: ast.AST) -> int:
    level: list[ast.AST] = [tree]
    depth = 0
    while level:
        depth += 1
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


class Behind:
    """Tells which nodes of a tree end after a prefix."""

    def __init__(self, prefix: str) -> None:
        """Takes the prefix that the tree's source begins with."""
        prefix = normalized(prefix)
        line, _ = end_of(prefix)
        # ast counts columns in bytes.
        self._boundary = (line, len(prefix[prefix.rfind("\n") + 1 :].encode()))

    def __call__(self, node: ast.AST) -> bool | None:
        """Returns whether a node ends after the prefix; None where nodes of its kind have no place."""
        line, column = getattr(node, "end_lineno", None), getattr(node, "end_col_offset", None)
        return None if line is None or column is None else (line, column) > self._boundary
