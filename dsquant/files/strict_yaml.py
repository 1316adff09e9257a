"""Reads YAML that people write: a key given twice is refused, with its lines, and so is anything that is not valid
text.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from dsquant.errors import InputError
from dsquant.files.foreign import blaming, read_file

# Far more than any recipe has.
LARGEST_BYTES = 2**18
LONGEST_NUMBER = 100
# Largest number of values with aliases written out.
MOST_VALUES = 10_000


class _Loader(yaml.SafeLoader):
    """The safe loader, with unique keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            merges = key_node.tag == "tag:yaml.org,2002:merge"
            key, line = key_node.value if merges else self.construct_object(key_node, deep=True), _line(key_node)
            if isinstance(key, Hashable):
                if key in seen:
                    raise InputError(f"line {line}: the key {key!r:.80} is given twice, first in line {seen[key]}")
                seen[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> Any:
    """Reads a YAML file into plain values; `what` names its content in messages. Raises InputError where it cannot be
    read, is not YAML, gives a key twice, or holds text that cannot be meant."""
    where = f"{path}: the {what} cannot be read"
    raw = read_file(path, LARGEST_BYTES)
    try:
        with blaming(where, "correct the file"):
            loader = _Loader(raw.decode("utf-8-sig"))
            try:
                node = loader.get_single_node()
                if node is None:
                    return None
                _check_node(node, {}, ())
                return loader.construct_document(node)
            finally:
                loader.dispose()
    except InputError as error:
        told = str(error)
        raise InputError(told if told.startswith(str(path)) else f"{where}: {told}") from error


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _check_node(node: yaml.Node, sizes: dict[yaml.Node, int], above: tuple[yaml.Node, ...]) -> int:
    """Checks texts, and counts the values below a node with its aliases written out."""
    if node in above:
        raise InputError(f"line {_line(node)}: a value contains itself")
    if node not in sizes:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        else:
            children = node.value
        sizes[node] = 1 + sum(_check_node(child, sizes, (*above, node)) for child in children)
    if sizes[node] > MOST_VALUES:
        raise InputError(f"line {_line(node)}: more than {MOST_VALUES} values, with aliases written out")
    return sizes[node]


def _check_scalar(node: yaml.ScalarNode) -> None:
    if not node.tag.endswith(":str") and len(node.value) > LONGEST_NUMBER:  # reading one takes the square of its length
        raise InputError(f"line {_line(node)}: a number of {len(node.value)} digits")
    if "\0" in node.value:
        raise InputError(f"line {_line(node)}: a text holds a null byte")
    try:
        node.value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"line {_line(node)}: a text holds half a surrogate pair, which is not a character") from error
