"""The license of a checkpoint, as its model card or config.json names it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.files.foreign import find_file, read_file

CARD_FILE = "README.md"
_KEYS = ("license", "license_name", "license_link")
_LONGEST_CARD = 2**20
# Names, paths and addresses: what means the same in YAML and in Markdown.
_VALUE = re.compile(r"[\w./+-][\w.:/+-]{0,199}", re.ASCII)


def read_license(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns `license`, `license_name` and `license_link`, those that the card's front matter has, or `license` of
    config.json; what is no plain name or address is left out."""
    found = {**{key: config[key] for key in _KEYS[:1] if key in config}, **_front_matter(folder)}
    return {key: found[key] for key in _KEYS if key in found and _VALUE.fullmatch(str(found[key]))}


def _front_matter(folder: Path) -> dict[str, str]:
    """A card that cannot be read is none: weights do not depend on it."""
    try:
        path = find_file(folder, CARD_FILE)
        text = "" if path is None else read_file(path, _LONGEST_CARD).decode("utf-8", "replace")
    except InputError:
        return {}
    match = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    lines = match[1].splitlines() if match else []
    pairs = (line.partition(":") for line in lines)
    return {key: value.strip().strip("'\"") for key, _, value in pairs if key in _KEYS}
