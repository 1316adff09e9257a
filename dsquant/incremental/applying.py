"""Builds the new output from the earlier one and a patch, which is checked completely before anything is written."""

import hashlib
import json
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.escaping import counted
from dsquant.files.disk import NO_ROOM, PARTIAL, copy_file, remove_empty, remove_tree, sync_folder
from dsquant.files.foreign import check_plain_files, find_file, read_file
from dsquant.files.sealing import block_sizes, broken_sections, hash_files
from dsquant.incremental.patch import xored
from dsquant.incremental.patch_manifest import PatchManifest, member_blocks, open_patch, read_manifest, read_member
from dsquant.incremental.places import check_output, lies_in, with_ending
from dsquant.incremental.reuse import reuse_file, ways_of
from dsquant.jobs.folder import remove_work
from dsquant.jobs.folder_state import JOB_FILE, RECORD_FILE, WORK_FOLDER
from dsquant.jobs.locks import exclusive
from dsquant.jobs.resources import check_disk
from dsquant.options import format_size
from dsquant.reporting.notebook import Shown


@dataclass(frozen=True)
class AppliedPatch(Shown):
    """The output that a patch was applied to."""

    output: Path
    num_files: int
    num_bytes: int
    reused: dict[str, int]
    """How files were reused -> number of files."""

    def as_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {**vars(self), "output": str(self.output)}

    def tables(self) -> Iterator[Any]:
        """Yields a line with the files and how they were reused."""
        from rich.text import Text

        files, size = counted(self.num_files, "file"), format_size(self.num_bytes)
        yield Text(f"{self.output}: {files}, {size}; reused: {ways_of(self.reused)}.")


def apply_patch(patch: Path, old: Path, output: Path, safe_point: Callable[[str], None]) -> AppliedPatch:
    """Builds the new output from the earlier one and a patch, and hashes every file of it.

    `safe_point` is called with each file's name and may raise to stop; nothing of the output is left where this fails
    or is stopped. Raises InputError where the patch is damaged or belongs to another output, an old file is damaged, or
    the output folder is in use.
    """
    try:
        with open_patch(patch) as archive:
            return _apply(archive, patch, old, output, safe_point)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise InputError(f"{patch} cannot be applied to {old}: {error}") from error


def _apply(
    archive: zipfile.ZipFile, patch: Path, old: Path, output: Path, safe_point: Callable[[str], None]
) -> AppliedPatch:
    manifest = read_manifest(archive, patch)
    _check_old(manifest, patch, old)
    _check_record(archive, manifest, patch, old)
    check_disk(output, sum(entry.bytes for entry in manifest.files.values() if entry.how != "same"))
    reused: Counter[str] = Counter()
    with _new_folder(patch, old, output) as work:
        for name, entry in manifest.files.items():
            safe_point(name)
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            if entry.how == "same":
                reused[reuse_file(old / name, work / name)] += 1
            elif entry.how == "tensors":
                _patch_tensors(archive, old / name, work / name, name, entry.tensors)
            else:
                _write_new(work / name, member_blocks(archive, f"new/{name}"))
        for name, found in hash_files(work, manifest.files, safe_point).items():
            if found != manifest.files[name].model_dump(include={"bytes", "sha256"}):
                raise InputError(
                    f"{old / name} or {patch} is damaged: {name} would have another hash than expected; "
                    f"see `dsquant verify {old}`"
                )
    return AppliedPatch(
        output, len(manifest.files), sum(entry.bytes for entry in manifest.files.values()), dict(reused)
    )


def _check_old(manifest: PatchManifest, patch: Path, old: Path) -> None:
    """Checks that the old output is the patch's, and that the files that the patch builds on are there."""
    record = find_file(old, RECORD_FILE)
    if record is None or hashlib.sha256(read_file(record)).hexdigest() != manifest.old_record_sha256:
        raise InputError(f"{old} is not the output that {patch} was made from (its {RECORD_FILE} differs)")
    for name, entry in manifest.files.items():
        if entry.how == "new":
            continue
        path = find_file(old, name)
        found = "is missing" if path is None else f"has {path.stat().st_size} bytes"
        if found != f"has {entry.bytes} bytes":
            raise InputError(
                f"{old / name} {found}, {patch} builds on {entry.bytes} bytes of it; see `dsquant verify {old}`"
            )


def _check_record(archive: zipfile.ZipFile, manifest: PatchManifest, patch: Path, old: Path) -> None:
    """Checks that the patch builds the files that the new output's own record lists."""
    entry = manifest.files.get(RECORD_FILE)
    if entry is None or entry.how == "tensors":
        raise InputError(f"{patch} does not hold the new output's {RECORD_FILE}; create the patch again")
    same = entry.how == "same"
    raw = read_file(old / RECORD_FILE) if same else read_member(archive, f"new/{RECORD_FILE}", patch)
    if hashlib.sha256(raw).hexdigest() != entry.sha256 or broken_sections(raw):
        raise InputError(f"{patch}: the new output's {RECORD_FILE} is damaged; create the patch again")
    recorded = json.loads(raw).get("files")
    if not isinstance(recorded, dict):
        raise InputError(f"{patch}: the new output's {RECORD_FILE} lists no files; create the patch again")
    for name in sorted({*manifest.files, *recorded} - {RECORD_FILE}):
        made, told = manifest.files.get(name), recorded.get(name)
        if (
            made is None
            or not isinstance(told, dict)
            or (made.bytes, made.sha256) != (told.get("bytes"), told.get("sha256"))
        ):
            raise InputError(
                f"{patch} builds {name} with another hash or size than the new output's record; create the patch again"
            )


@contextmanager
def _new_folder(patch: Path, old: Path, output: Path) -> Iterator[Path]:
    """Yields a folder that becomes the output when it is complete, and is removed otherwise."""
    check_output(output, old)
    work = with_ending(output, PARTIAL)
    mark = work / WORK_FOLDER  # identifies the leftovers of a killed run
    _check_free(output)
    mine = mark.is_dir() and not work.is_symlink() and not (mark / JOB_FILE).exists()
    if lies_in(old, work) or lies_in(patch, work) or (os.path.lexists(work) and not mine):
        raise InputError(f"{work} is in the way; move it, or name another folder with --output")
    check_plain_files(work)
    absent = [folder for folder in work.absolute().parents if not folder.exists()]
    try:
        with exclusive(mark, output):
            try:
                _check_free(output)  # by the run that held the lock until now
                for path in work.iterdir():
                    if path != mark:
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                yield work
            except BaseException:
                remove_tree(work)
                raise
            if output.exists():
                output.rmdir()
            work.rename(output)
            sync_folder(output.absolute().parent)
            remove_work(output)
    finally:
        remove_empty(absent)


def _check_free(output: Path) -> None:
    if output.is_symlink() or (output.exists() and any(output.iterdir())):
        raise InputError(f"{output} is a link or not empty; name a new folder")


def _write_new(path: Path, blocks: Iterable[bytes]) -> None:
    with path.open("xb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _patch_tensors(
    archive: zipfile.ZipFile, old: Path, new: Path, name: str, places: tuple[tuple[int, int], ...]
) -> None:
    copy_file(old, new)
    with new.open("r+b") as file:
        for number, (start, num_bytes) in enumerate(places):
            with archive.open(f"xor/{name}/{number}") as member:
                place = start
                for size in block_sizes(num_bytes):
                    file.seek(place)
                    changed = xored(file.read(size), member.read(size))
                    file.seek(place)
                    file.write(changed)
                    place += size
        file.flush()
        os.fsync(file.fileno())
