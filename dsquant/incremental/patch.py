"""Writes the difference of two outputs as one file: a zip of whole small files and of the tensors that changed.

A changed tensor is stored as its bytes XOR the old ones, deflated: unchanged codes are zeros there. patch.json lists
for every file of the new output how it is built, and its hash. A patch's bytes are a function of the two outputs (and
of the zlib that deflates them): no member carries a time or the mode of a file.
"""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsquant.files.disk import PARTIAL, naming, publish, sync_folder
from dsquant.files.foreign import read_file
from dsquant.files.sealing import BYTES_AT_ONCE, block_sizes
from dsquant.incremental.patch_manifest import MANIFEST, PatchedFile, PatchManifest
from dsquant.jobs.folder_state import RECORD_FILE
from dsquant.source.shards import read_header


def write_patch(old: Path, new: Path, patch: Path, safe_point: Callable[[str], None]) -> None:
    """Writes the patch from an output to another of the same layout.

    `safe_point` is called with each file's name; it may raise to stop.
    """
    before, now = (_entries(folder) for folder in (old, new))
    partial = patch.with_name(patch.name + PARTIAL)
    files: dict[str, PatchedFile] = {}
    try:
        with naming(patch), zipfile.ZipFile(partial, "w") as archive:
            for name, entry in now.items():
                safe_point(name)
                seal = {"bytes": entry["bytes"], "sha256": entry["sha256"]}
                if name in before and before[name]["sha256"] == entry["sha256"]:
                    files[name] = PatchedFile(**seal, how="same")
                elif name in before and _same_layout(before[name], entry) and name.endswith(".safetensors"):
                    places = _add_tensors(archive, old / name, new / name, name)
                    files[name] = PatchedFile(**seal, how="tensors", tensors=places)
                else:
                    _add_file(archive, new / name, f"new/{name}", entry["bytes"])
                    files[name] = PatchedFile(**seal, how="new")
            manifest = PatchManifest(patch_version=1, old_record_sha256=before[RECORD_FILE]["sha256"], files=files)
            archive.writestr(_member(MANIFEST), manifest.model_dump_json())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    publish(partial, patch)
    sync_folder(patch.absolute().parent)


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the record's entry of every file of an output, the record included."""
    raw = read_file(folder / RECORD_FILE)
    own = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    return {**json.loads(raw)["files"], RECORD_FILE: own}


def _same_layout(before: dict[str, Any], now: dict[str, Any]) -> bool:
    layouts = [
        [(name, dtype, shape) for name, (dtype, _, *shape) in entry.get("tensors", {}).items()]
        for entry in (before, now)
    ]
    return layouts[0] == layouts[1]


def _member(name: str, num_bytes: int = 0) -> zipfile.ZipInfo:
    """Returns a new member dated 1980, ZipInfo's default; zipfile itself would take current time and file mode."""
    info = zipfile.ZipInfo(name)
    info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, num_bytes
    info.create_system, info.external_attr = 3, 0o644 << 16  # a Unix, whose attributes are modes
    return info


def _add_file(archive: zipfile.ZipFile, path: Path, name: str, num_bytes: int) -> None:
    """Adds a whole file."""
    with path.open("rb") as file, archive.open(_member(name, num_bytes), "w") as member:
        shutil.copyfileobj(file, member, BYTES_AT_ONCE)


def _add_tensors(archive: zipfile.ZipFile, old: Path, new: Path, name: str) -> tuple[tuple[int, int], ...]:
    """Adds every changed tensor of a file; returns the places, (start, bytes)."""
    places: list[tuple[int, int]] = []
    with old.open("rb") as before, new.open("rb") as now:
        for info in read_header(new).values():
            if _ranges_equal(old, new, info.start, info.num_bytes):
                continue
            with archive.open(_member(f"xor/{name}/{len(places)}", info.num_bytes), "w") as member:
                before.seek(info.start)
                now.seek(info.start)
                for size in block_sizes(info.num_bytes):
                    member.write(xored(before.read(size), now.read(size)))
            places.append((info.start, info.num_bytes))
    return tuple(places)


def _ranges_equal(old: Path, new: Path, start: int, num_bytes: int) -> bool:
    with old.open("rb") as before, new.open("rb") as now:
        before.seek(start)
        now.seek(start)
        return all(before.read(size) == now.read(size) for size in block_sizes(num_bytes))


def xored(first: bytes, second: bytes) -> bytes:
    """Returns two blocks of the same size, XOR."""
    return (np.frombuffer(first, np.uint8) ^ np.frombuffer(second, np.uint8)).tobytes()
