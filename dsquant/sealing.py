"""How an output's record guards every byte of the output, and itself.

dsquant.json holds the size and SHA-256 of every other file, and the SHA-256 of each of its own sections. Its bytes are
a function of its content: so a changed letter in a section shows in that section's hash, and one outside of it (white
space, a number written otherwise) in the comparison with what the content should look like.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

SECTIONS = "sections_sha256"
BYTES_AT_ONCE = 2**22
# What file systems allow.
MAX_NAME_BYTES = 255
_INNERMOST_LIST = re.compile(r"\[\n\s+([^\[\]{}]*?)\n\s+\]")


def canonical(data: Any) -> bytes:
    """JSON in one certain form: indented, lists of plain values on one line.

    Args:
        data: plain JSON values.

    Returns:
        UTF-8, with a newline at the end.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False)
    text = _INNERMOST_LIST.sub(lambda match: "[" + re.sub(r",\n\s+", ", ", match[1]) + "]", text)
    return (text + "\n").encode()


def seal(record: dict[str, Any]) -> bytes:
    """A record's bytes, with the hash of each of its sections behind them.

    Args:
        record: plain JSON values.

    Returns:
        What dsquant.json holds.
    """
    return canonical({**record, SECTIONS: _section_hashes(record)})


def _section_hashes(record: dict[str, Any]) -> dict[str, str]:
    return {key: hashlib.sha256(canonical(value)).hexdigest() for key, value in record.items() if key != SECTIONS}


def broken_sections(raw: bytes) -> list[str]:
    """What in a record is not as it was sealed.

    Args:
        raw: the content of dsquant.json.

    Returns:
        The damaged sections, or the damaged line where it is in none; empty where the record is whole.
    """
    try:
        record = json.loads(raw)
        hashes = record[SECTIONS]
        found = _section_hashes(record)
        broken = [key for key in found if hashes.get(key) != found[key]] + [key for key in hashes if key not in found]
    except UnicodeDecodeError as error:
        return [f"line {raw.count(10, 0, error.start) + 1}, no UTF-8"]
    except json.JSONDecodeError as error:
        return [f"line {error.lineno}, no JSON"]
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError, RecursionError):
        return [SECTIONS]
    if broken:
        return [f"section {key!r}" for key in broken]
    wanted = canonical(record)
    if raw == wanted:
        return []
    lines = zip(raw.splitlines(), wanted.splitlines(), strict=False)
    return [f"line {next((number for number, (found, line) in enumerate(lines, 1) if found != line), 'last')}"]


def plain_path(name: str) -> str:
    """Checks a file's name in a record: a record may come from anywhere.

    Args:
        name: the path, relative to the output folder.

    Returns:
        The same.

    Raises:
        ValueError: where it is not the one plain way to name a file inside the folder.
    """
    parts = PurePosixPath(name).parts
    if not parts or "/".join(parts) != name or name.startswith("/") or ".." in parts or "\0" in name:
        raise ValueError(f"{name!r:.300} is no plain path inside the output folder")
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        raise ValueError(f"{name[:40]!r}... is longer than the {MAX_NAME_BYTES} bytes of a file name")
    return name


def hash_files(folder: Path, names: Iterable[str], after_file: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Reads files once.

    Args:
        folder: where they lie.
        names: their paths in it.
        after_file: called with each finished file's name, from the calling thread; may raise to stop.

    Returns:
        Name -> bytes and sha256.
    """
    names = list(names)
    found = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for name, entry in zip(names, pool.map(lambda name: _hash_file(folder / name), names), strict=True):
                found[name] = entry
                after_file(name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _hash_file(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BYTES_AT_ONCE):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}
