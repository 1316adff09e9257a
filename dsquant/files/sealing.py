"""Seals an output's record, which guards every byte of the output and of itself.

dsquant.json holds the size and SHA-256 of every other file, and the SHA-256 of each of its own sections. Its bytes are
a function of its content: a changed letter in a section shows in that section's hash, and one outside of it (white
space, a number in another notation) in the comparison with the bytes that the content should have.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from dsquant.files.disk import begin_reading

SECTIONS = "sections_sha256"
# The record that `dsquant run` publishes with its outputs, sealed like theirs.
RELEASE_FILE = "release.json"
BYTES_AT_ONCE = 2**22
# The disk reads these of a file while what comes before them is hashed.
AHEAD_BYTES = 2**24
K = TypeVar("K")
T = TypeVar("T")
_INNERMOST_LIST = re.compile(r"\[\n\s+([^\[\]{}]*?)\n\s+\]")


def canonical(data: Any) -> bytes:
    """Returns plain JSON values as canonical UTF-8: indented, lists of plain values on one line, final newline."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    text = _INNERMOST_LIST.sub(lambda match: "[" + re.sub(r",\n\s+", ", ", match[1]) + "]", text)
    return (text + "\n").encode()


def seal(record: dict[str, Any]) -> bytes:
    """Returns the content of dsquant.json: a record, with the hash of each of its sections at the end."""
    return canonical({**record, SECTIONS: _section_hashes(record)})


def _section_hashes(record: dict[str, Any]) -> dict[str, str]:
    return {key: hashlib.sha256(canonical(value)).hexdigest() for key, value in record.items() if key != SECTIONS}


def broken_sections(raw: bytes) -> list[str]:
    """Returns the damaged sections of dsquant.json, or the damaged line where it is in none; empty if intact."""
    try:
        record = json.loads(raw)
        hashes = record[SECTIONS]
        found = _section_hashes(record)
        broken = [key for key in found if hashes.get(key) != found[key]] + [key for key in hashes if key not in found]
    except UnicodeDecodeError as error:
        return [f"line {raw.count(10, 0, error.start) + 1}, not UTF-8"]
    except json.JSONDecodeError as error:
        return [f"line {error.lineno}, not JSON"]
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        RecursionError,
    ):  # a number of 5000 digits, half a surrogate
        return [SECTIONS]
    if broken:
        return [f"section {key!r}" for key in broken]
    wanted = canonical(record)
    if raw == wanted:
        return []
    lines = zip(raw.splitlines(), wanted.splitlines(), strict=False)
    return [f"line {next((number for number, (found, line) in enumerate(lines, 1) if found != line), 'last')}"]


def record_of_folder(record: dict[str, Any], folder: PurePosixPath, own_name: str) -> dict[str, Any]:
    """Returns the record of one folder inside an output, not sealed, from the output's record.

    `own_name` is the file name of records, which no record lists in its own folder.
    """
    inside = {
        str(PurePosixPath(name).relative_to(folder)): entry
        for name, entry in record["files"].items()
        if PurePosixPath(name).is_relative_to(folder) and PurePosixPath(name) != folder / own_name
    }
    outputs = {
        name: {**entry, "folder": str(PurePosixPath(entry["folder"]).relative_to(folder))}
        for name, entry in record["outputs"].items()
        if PurePosixPath(entry["folder"]).is_relative_to(folder)
    }
    told = {key: value for key, value in record.items() if key != SECTIONS}
    return {**told, "outputs": outputs, "files": inside}


def hash_files(folder: Path, names: Iterable[str], after_file: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Reads files of a folder once; returns name -> bytes and sha256.

    `after_file` is called with each finished file's name, from the calling thread; it may raise to stop.
    """
    return in_threads(lambda name: _hash_file(folder / name), names, after_file)


def in_threads(read: Callable[[K], T], names: Iterable[K], after_file: Callable[[K], None]) -> dict[K, T]:
    """Reads files in several threads with `read`; returns name -> its result.

    `after_file` is called with each finished file's name, from the calling thread; it may raise to stop.
    """
    names = list(names)
    found: dict[K, T] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for name, result in zip(names, pool.map(read, names), strict=True):
                found[name] = result
                after_file(name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _hash_file(path: Path) -> dict[str, Any]:
    with path.open("rb", buffering=0) as file:
        return Hashed(file).rest()


def block_sizes(num_bytes: int) -> Iterator[int]:
    """Yields the sizes of the blocks in which a number of bytes is read."""
    while num_bytes:
        yield min(num_bytes, BYTES_AT_ONCE)
        num_bytes -= min(num_bytes, BYTES_AT_ONCE)


class Hashed:
    """A file that is read once, from start to end, and hashed meanwhile: large blocks in a thread of its own."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self._pool: ThreadPoolExecutor | None = None
        self._hashing: Future[None] | None = None

    def read(self, num_bytes: int) -> bytes:
        """Reads the next bytes; fewer where the file ends."""
        block = self._file.read(num_bytes)
        begin_reading(self._file.fileno(), self._num_bytes + len(block), AHEAD_BYTES)
        self._wait()
        if len(block) < BYTES_AT_ONCE:
            self._digest.update(block)
        else:
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="dsquant-hash")
            self._hashing = self._pool.submit(self._digest.update, block)
        self._num_bytes += len(block)
        return block

    def _wait(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None

    def rest(self) -> dict[str, Any]:
        """Reads what is left; returns bytes and sha256 of the whole file."""
        while self.read(BYTES_AT_ONCE):
            pass
        self._wait()
        if self._pool is not None:
            self._pool.shutdown()
        return {"bytes": self._num_bytes, "sha256": self._digest.hexdigest()}
