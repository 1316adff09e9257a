"""Finished outputs: their formats, places of tensors in their files, and records written anew."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsquant.files.sealing import seal

OUTPUTS = ("awq", "compressed-tensors", "gguf")


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites a record as a faulty writer would have: sealed, with the true hashes of all files."""
    record = json.loads((folder / "dsquant.json").read_text())
    for name, entry in record["files"].items():
        content = (folder / name).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(record)
    del record["sections_sha256"]
    (folder / "dsquant.json").write_bytes(seal(record))


def place_of(path: Path, tensor: str) -> tuple[int, int]:
    """First byte and size of a tensor in a file."""
    if path.suffix == ".gguf":
        from gguf import GGUFReader

        return next((int(t.data_offset), int(t.n_bytes)) for t in GGUFReader(path).tensors if t.name == tensor)
    raw = path.read_bytes()
    header_bytes = struct.unpack("<Q", raw[:8])[0]
    begin, end = json.loads(raw[8 : 8 + header_bytes])[tensor]["data_offsets"]
    return 8 + header_bytes + int(begin), int(end) - int(begin)
