"""What an interrupted job has left is checked before it continues: nothing damaged becomes part of an output."""

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.files.sealing import block_sizes
from dsquant.formats.protocol import Target
from dsquant.jobs.folder import Job
from dsquant.jobs.journal import START_OVER
from dsquant.pipeline.manifest import tensor_hashes

# Files in the work folder are hashed in parts of this size, many at a time: hidden states are gigabytes.
PART_BYTES = 2**26


def kept_files(work: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns file -> bytes, and the SHA-256 of each part of `PART_BYTES`, of what a unit leaves in the work folder for
    later units, for its journal line; names of absent files are left out."""
    return _hash_parts(work, [name for name in names if (work / name).is_file()], lambda: None)


def _hash_parts(folder: Path, names: Iterable[str], safe_point: Callable[[], None]) -> dict[str, dict[str, Any]]:
    sizes = {name: (folder / name).stat().st_size for name in names}
    parts = [(name, offset) for name, size in sizes.items() for offset in range(0, size, PART_BYTES)]
    found: dict[str, dict[str, Any]] = {name: {"bytes": size, "sha256": []} for name, size in sizes.items()}
    with closing(_hashed((folder / name, offset, PART_BYTES) for name, offset in parts)) as digests:
        for (name, _), digest in zip(parts, digests, strict=True):
            found[name]["sha256"].append(digest)
            safe_point()
    return found


def check_units(job: Job, units: Sequence[str]) -> None:
    """Raises InputError unless the journal holds the first of all units, in order, and nothing else."""
    for unit, entry in job.journal.units.items():
        if not _is_sound(entry):
            raise InputError(f"{job.work}: the journal's line of {unit} is damaged; {START_OVER}")
    found = list(job.journal.units)
    if found != list(units[: len(found)]):
        raise InputError(f"{job.work}: the journal does not hold the job's first units in order; {START_OVER}")


def _is_sound(entry: Mapping[str, Any]) -> bool:
    """Whether a unit's line has the shape of one."""
    kept, tensors = entry.get("kept", {}), entry.get("tensors")
    return (
        isinstance(kept, dict)
        and all(isinstance(file, dict) and {"bytes", "sha256"} <= file.keys() for file in kept.values())
        and isinstance(tensors, dict)
        and all(isinstance(hashes, dict) for hashes in tensors.values())
        and isinstance(entry.get("source", {}), dict)
        and isinstance(entry.get("layer", {}), dict)
    )


def check_kept(job: Job, hidden: Sequence[str], safe_point: Callable[[], None]) -> None:
    """Checks what finished units have left in the work folder, `hidden` being the files of hidden states that the next
    unit reads; raises InputError where a file is gone or not what the journal says."""
    kept = {name: entry for unit in job.journal.units.values() for name, entry in unit.get("kept", {}).items()}
    missing = [name for name in hidden if name not in kept]
    if missing:
        raise InputError(
            f"{job.work}: the journal does not tell of {missing[0]}, which the next unit reads; {START_OVER}"
        )
    wanted = {name: entry for name, entry in kept.items() if name in hidden or not name.endswith(".f32")}
    check_files(job.work, wanted, safe_point)


def check_files(work: Path, wanted: Mapping[str, Mapping[str, Any]], safe_point: Callable[[], None]) -> None:
    """Raises InputError where a file in the work folder is gone, or not what `kept_files` told of it."""
    for name, entry in wanted.items():
        path = work / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise InputError(f"{path} of the interrupted job is gone or has another size; {START_OVER}")
    found = _hash_parts(work, wanted, safe_point)
    damaged = [name for name, entry in wanted.items() if found[name] != entry]
    if damaged:
        raise InputError(f"{work / damaged[0]} of the interrupted job is damaged; {START_OVER}")


def check_target(job: Job, target: Target, safe_point: Callable[[], None]) -> None:
    """Checks what finished units have left of an output: files' sizes and headers, and every tensor's hash; raises
    InputError where a file is gone or damaged."""
    hashes = tensor_hashes(job.journal.units, target.folder)
    for file in target.finished_files(job.output, list(job.journal.units), hashes):
        _check_whole(file.path, file.header, file.num_bytes)
        places = {name: (file.path, offset, size) for name, (offset, size) in file.places.items()}
        _check_tensors(places, hashes, safe_point)


def _check_whole(path: Path, header: bytes, num_bytes: int) -> None:
    if not path.is_file() or path.stat().st_size != num_bytes:
        raise InputError(f"{path} of the interrupted job is gone or has another size; {START_OVER}")
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            raise InputError(f"{path} of the interrupted job has another header; {START_OVER}")


def _check_tensors(
    places: Mapping[str, tuple[Path, int, int]], hashes: Mapping[str, str], safe_point: Callable[[], None]
) -> None:
    with closing(_hashed(places.values())) as digests:
        for name, digest in zip(places, digests, strict=True):
            if digest != hashes.get(name):
                raise InputError(f"{places[name][0]}: tensor {name!r} of the interrupted job is damaged; {START_OVER}")
            safe_point()


def _hashed(places: Iterable[tuple[Path, int, int]]) -> Generator[str, None, None]:
    """The hashes of parts of files, in order; several are read at a time."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            yield from pool.map(lambda place: _hash(*place), places)
        finally:
            pool.shutdown(cancel_futures=True)


def _hash(path: Path, offset: int, num_bytes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        for size in block_sizes(num_bytes):
            digest.update(file.read(size))
    return digest.hexdigest()
