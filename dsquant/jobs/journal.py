"""Notes that survive a kill and prove themselves: every line carries the SHA-256 of its own text."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.files.disk import naming
from dsquant.files.foreign import read_file
from dsquant.files.strict_json import parse_json

# What to do where an interrupted job is damaged.
START_OVER = "start over with --restart"
_CHECKSUM = b', "sha256": "'


def checked_line(notes: dict[str, Any]) -> bytes:
    """Returns a JSON object of at least one key as a line of UTF-8, its last key the SHA-256 of all before it."""
    text = json.dumps(notes).encode()[:-1]
    return text + _CHECKSUM + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


def read_checked_line(line: bytes, where: str) -> dict[str, Any]:
    """Reads what `checked_line` wrote; raises InputError, which names `where`, if a byte of it has changed."""
    text, _, checksum = line.removesuffix(b"\n").rpartition(_CHECKSUM)
    if checksum != hashlib.sha256(text).hexdigest().encode() + b'"}':
        raise InputError(f"{where} is damaged: it does not match its checksum; {START_OVER}")
    notes = parse_json(text + b"}", where, START_OVER, finite=False)
    assert isinstance(notes, dict)
    return notes


class Journal:
    """An append-only file with one checked line for each finished unit."""

    def __init__(self, path: Path, job: str = "") -> None:
        """Reads the lines, without one that a kill cut off; raises InputError where one is damaged or of another
        job."""
        self._path, self._job = path, job
        raw = read_file(path) if path.exists() else b""
        complete = raw[: raw.rfind(b"\n") + 1]
        if complete != raw:
            os.truncate(path, len(complete))
        lines = complete.split(b"\n")[:-1]
        self._entries = [self._entry(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]

    def _entry(self, line: bytes, where: str) -> dict[str, Any]:
        entry = read_checked_line(line, where)
        if not isinstance(entry.get("unit"), str):
            raise InputError(f"{where}: not a line of a journal, which names a 'unit'; {START_OVER}")
        if entry.pop("job", None) != self._job:
            raise InputError(f"{where}: written by another job than the one in this folder; {START_OVER}")
        return entry

    @property
    def units(self) -> dict[str, dict[str, Any]]:
        """Unit -> what was noted of it."""
        return {entry["unit"]: entry for entry in self._entries}

    def append(self, unit: str, **notes: Any) -> None:
        """Notes a finished unit; when this returns the line is on disk."""
        entry = {"unit": unit, **notes}
        with naming(self._path), self._path.open("ab") as file:
            file.write(checked_line({**entry, "job": self._job}))
            file.flush()
            os.fsync(file.fileno())
        self._entries.append(entry)
