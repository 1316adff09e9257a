"""JSON that others wrote: what is no certain value (NaN, a key given twice, half a surrogate pair) is refused."""

import json
import math
import re
import stat
from pathlib import Path
from typing import Any

from dsquant.errors import InputError

# What is longer is damaged or hostile. A record of R1 in three formats has 80 MB.
LONGEST_JSON_BYTES = 2**28
# The files of a checkpoint are shorter: R1's index has 9 MB. It is safetensors' own bound for headers.
LONGEST_MODEL_JSON_BYTES = 100_000_000
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes | str, where: Path | str, then: str = "restore the file", finite: bool = True) -> Any:
    """Parses JSON.

    Args:
        raw: the text, UTF-8 where it is bytes.
        where: the file, and the line where that is known; for the message.
        then: what to do about it; for the message.
        finite: whether NaN and infinity are refused; our own records may hold them.

    Returns:
        Plain values, every number finite unless asked otherwise.

    Raises:
        InputError: where it is not JSON, is nested too deeply, gives a key twice, or holds a number that is not finite
            or a text that cannot be written as UTF-8.
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
        raise InputError(f"{where}: a text holds half a surrogate pair, which is no character; {then}") from error
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error}); {then}") from error
    return found


def check_readable(path: Path, most_bytes: int, then: str = "restore the file") -> None:
    """Refuses what should not be read whole: a file of no sane size, a pipe, a device.

    Args:
        path: the file.
        most_bytes: the longest file that is read.
        then: what to do where it cannot be used; for the message.

    Raises:
        InputError: where it is not a regular file, or is longer.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {then}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: not a regular file; {then}")
    if status.st_size > most_bytes:
        raise InputError(f"{path}: has {status.st_size} bytes, at most {most_bytes} are read; {then}")


def read_bounded(path: Path, most_bytes: int = LONGEST_JSON_BYTES, then: str = "restore the file") -> bytes:
    """Reads a file whole, unless it is longer than a file of its kind can be.

    Args:
        path: the file.
        most_bytes: the longest file that is read.
        then: what to do where it cannot be used; for the message.

    Returns:
        Its content.

    Raises:
        InputError: where it cannot be read, is not a regular file, or is longer.
    """
    check_readable(path, most_bytes, then)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {then}") from error


def read_json_object(
    path: Path, then: str = "restore the file", finite: bool = True, most_bytes: int = LONGEST_JSON_BYTES
) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Args:
        path: the file.
        then: what to do where it cannot be used; for the message.
        finite: as in `parse_json`.
        most_bytes: as in `read_bounded`.

    Returns:
        Its content.

    Raises:
        InputError: where it cannot be read, or is not what `parse_json` accepts, or is no object.
    """
    found = parse_json(read_bounded(path, most_bytes, then), path, then, finite)
    if not isinstance(found, dict):
        raise InputError(f"{path}: must hold a JSON object, found {type(found).__name__}; {then}")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is not finite")
    return number
