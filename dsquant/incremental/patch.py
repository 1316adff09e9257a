"""What turns one output into the next, as one file: a zip of whole small files and of the tensors that changed.

A changed tensor is stored as its bytes XOR the old ones, deflated: codes that stayed are zeros there. patch.json tells
of every file of the new output how it comes about, and its hash.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dsquant.errors import InputError
from dsquant.incremental.reuse import reuse_file
from dsquant.jobs import PARTIAL, RECORD_FILE, sync_folder, write_atomically
from dsquant.notebook import as_html
from dsquant.sealing import BYTES_AT_ONCE, hash_files
from dsquant.source.shards import read_header

PATCH_VERSION = 1
MANIFEST = "patch.json"
LEVEL = 6


def write_patch(old: Path, new: Path, patch: Path, safe_point: Callable[[str], None]) -> None:
    """Writes the patch from an output to another of the same layout.

    Args:
        old: the earlier output.
        new: the new one.
        patch: the file to make.
        safe_point: called with each file's name; may raise to stop.
    """
    before, now = (_entries(folder) for folder in (old, new))
    partial = patch.with_name(patch.name + PARTIAL)
    files: dict[str, dict[str, Any]] = {}
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as archive:
        for name, entry in now.items():
            safe_point(name)
            files[name] = {"bytes": entry["bytes"], "sha256": entry["sha256"], "how": "new"}
            if name in before and before[name]["sha256"] == entry["sha256"]:
                files[name]["how"] = "same"
            elif name in before and _same_layout(before[name], entry) and name.endswith(".safetensors"):
                files[name] |= {"how": "tensors", "tensors": _add_tensors(archive, old / name, new / name, name)}
            else:
                archive.write(new / name, f"new/{name}")
        manifest = {"patch_version": PATCH_VERSION, "old_record_sha256": _sha256(old / RECORD_FILE), "files": files}
        archive.writestr(MANIFEST, json.dumps(manifest))
    partial.replace(patch)
    sync_folder(patch.absolute().parent)


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file of an output, its record too."""
    raw = (folder / RECORD_FILE).read_bytes()
    own = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    return {**json.loads(raw)["files"], RECORD_FILE: own}


def _same_layout(before: dict[str, Any], now: dict[str, Any]) -> bool:
    layouts = [
        [(name, dtype, shape) for name, (dtype, _, *shape) in entry.get("tensors", {}).items()]
        for entry in (before, now)
    ]
    return layouts[0] == layouts[1]


def _add_tensors(archive: zipfile.ZipFile, old: Path, new: Path, name: str) -> list[list[int]]:
    """Adds every changed tensor of a file; returns the places, [start, bytes]."""
    places: list[list[int]] = []
    with old.open("rb") as before, new.open("rb") as now:
        for info in read_header(new).values():
            if _ranges_equal(old, new, info.start, info.num_bytes):
                continue
            with archive.open(f"xor/{name}/{len(places)}", "w", force_zip64=True) as member:
                before.seek(info.start)
                now.seek(info.start)
                for size in _sizes(info.num_bytes):
                    member.write(_xor(before.read(size), now.read(size)))
            places.append([info.start, info.num_bytes])
    return places


def _ranges_equal(old: Path, new: Path, start: int, num_bytes: int) -> bool:
    with old.open("rb") as before, new.open("rb") as now:
        before.seek(start)
        now.seek(start)
        return all(before.read(size) == now.read(size) for size in _sizes(num_bytes))


def _sizes(num_bytes: int) -> Iterator[int]:
    while num_bytes:
        yield min(num_bytes, BYTES_AT_ONCE)
        num_bytes -= min(num_bytes, BYTES_AT_ONCE)


def _xor(first: bytes, second: bytes) -> bytes:
    return (np.frombuffer(first, np.uint8) ^ np.frombuffer(second, np.uint8)).tobytes()


@dataclass(frozen=True)
class AppliedPatch:
    """What applying a patch made."""

    output: Path
    num_files: int
    num_bytes: int
    reused: dict[str, int]
    """How files were reused -> number of files."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "output": str(self.output)}

    def _repr_html_(self) -> str:
        from dsquant.incremental.tables import patch_tables

        return as_html(patch_tables(self))


def apply_patch(patch: Path, old: Path, output: Path, safe_point: Callable[[str], None]) -> AppliedPatch:
    """Makes the new output from the earlier one and a patch; every file of it is hashed.

    Args:
        patch: the patch.
        old: the earlier output.
        output: the folder to make.
        safe_point: called with each file's name; may raise to stop.

    Returns:
        What was made.

    Raises:
        InputError: where the patch is damaged or of another output, an old file is damaged, or the folder is in use.
    """
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output} is not empty; name a folder to make")
    try:
        with zipfile.ZipFile(patch) as archive:
            return _apply(archive, patch, old, output, safe_point)
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError) as error:
        if isinstance(error, OSError) and patch.is_file():
            raise
        raise InputError(f"{patch} is damaged or no patch of dsquant ({error}); make it again") from error


def _apply(
    archive: zipfile.ZipFile, patch: Path, old: Path, output: Path, safe_point: Callable[[str], None]
) -> AppliedPatch:
    manifest = json.loads(archive.read(MANIFEST))
    record = old / RECORD_FILE
    if not record.is_file() or _sha256(record) != manifest["old_record_sha256"]:
        raise InputError(f"{old} is not the output that {patch} was made from (its {RECORD_FILE} is another)")
    work = output.with_name(output.name + PARTIAL)
    reused: dict[str, int] = {}
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name, entry in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{patch}: {name!r} would leave the output folder; refused")
        safe_point(name)
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        if entry["how"] == "same":
            how = reuse_file(old / name, work / name)
            reused[how] = reused.get(how, 0) + 1
        elif entry["how"] == "tensors":
            _patch_tensors(archive, old / name, work / name, name, entry["tensors"])
        else:
            write_atomically(work / name, archive.read(f"new/{name}"))
    foreign = sorted(
        str(path) for path in work.rglob("*") if path.is_file() and str(path.relative_to(work)) not in files
    )
    if foreign:
        raise InputError(f"{foreign[0]} is left over from something else; remove {work} and apply the patch again")
    found = hash_files(work, files, safe_point)
    for name, entry in found.items():
        if entry["sha256"] != files[name]["sha256"]:
            raise InputError(f"{old / name} or {patch} is damaged: {name} would not be what it should be")
    if output.exists():
        output.rmdir()
    work.rename(output)
    sync_folder(output.absolute().parent)
    return AppliedPatch(output, len(files), sum(entry["bytes"] for entry in files.values()), reused)


def _patch_tensors(archive: zipfile.ZipFile, old: Path, new: Path, name: str, places: list[list[int]]) -> None:
    shutil.copyfile(old, new)
    with new.open("r+b") as file:
        for number, (start, num_bytes) in enumerate(places):
            with archive.open(f"xor/{name}/{number}") as member:
                place = start
                for size in _sizes(num_bytes):
                    file.seek(place)
                    changed = _xor(file.read(size), member.read(size))
                    file.seek(place)
                    file.write(changed)
                    place += size
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
