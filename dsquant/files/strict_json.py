"""Parses JSON that others wrote: ambiguous values (NaN, a key given twice, half a surrogate pair) are refused."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsquant.errors import InputError
from dsquant.files.foreign import LARGEST_TEXT_BYTES, read_file

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes | str, where: Path | str, then: str = "restore the file", finite: bool = True) -> Any:
    """Parses JSON into plain values; bytes are UTF-8. NaN and infinity are refused unless `finite` is false, for our
    records.

    `where` is the file (and line), `then` what to do about an error, for messages. Raises InputError where it is not
    JSON, is nested too deeply, gives a key twice, or holds a number that is not finite or a text that is not UTF-8.
    """
    number = _number if finite else float
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
        found = json.loads(text, object_pairs_hook=_object, parse_constant=number, parse_float=number)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise InputError(f"{where}: not valid JSON that can be read: it is nested too deeply; {then}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: a text holds half a surrogate pair, which is not a character; {then}") from error
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error}); {then}") from error
    return found


def read_json_object(
    path: Path, then: str = "restore the file", finite: bool = True, most_bytes: int = LARGEST_TEXT_BYTES
) -> dict[str, Any]:
    """Reads a file that holds a JSON object. Raises InputError where it cannot be read, is too long, is not what
    `parse_json` accepts, or not an object."""
    try:
        raw = read_file(path, most_bytes)
    except InputError as error:
        raise InputError(f"{error}; {then}") from error
    found = parse_json(raw, path, then, finite)
    if not isinstance(found, dict):
        raise InputError(f"{path}: must hold a JSON object, found {type(found).__name__}; {then}")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r:.80} is given twice")
    return found


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is not finite")
    return number


def first_problem(error: ValidationError, *above: str) -> str:
    """Returns place and message of the first problem that pydantic found; `above` are the outer parts of the place."""
    first = error.errors()[0]
    return f"{', '.join([*above, *(repr(part)[:80] for part in first['loc'])])}: {first['msg']}"
