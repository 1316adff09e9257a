"""Checks where an output and a patch may be written, before any work."""

import hashlib
import tempfile
from pathlib import Path

from dsquant.errors import InputError
from dsquant.files.disk import PARTIAL
from dsquant.files.foreign import read_file
from dsquant.incremental.patch_manifest import open_patch, read_manifest
from dsquant.incremental.recording import Recording
from dsquant.jobs.folder_state import RECORD_FILE, check_name


def lies_in(path: Path, folder: Path) -> bool:
    """Returns whether a path is a folder or something in it, links followed."""
    return path.resolve().is_relative_to(folder.resolve())


def with_ending(output: Path, ending: str) -> Path:
    """Returns the path next to an output whose name is the output's plus an ending such as .patch. Raises InputError
    where the output is the root folder."""
    named = output if output.name.strip(".") else output.resolve()
    if not named.name:
        raise InputError(f"{output} cannot be the new folder; name another one with --output")
    return named.with_name(named.name + ending)


def check_output(output: Path, old: Path) -> None:
    """Raises InputError where a folder cannot be created, or it and the old output lie in each other."""
    check_name(output)
    if lies_in(output, old) or lies_in(old, output):
        raise InputError(
            f"one of {output} and the old output {old} lies in the other; name a folder outside it with --output"
        )


def check_patch(patch: Path, output: Path, recording: Recording, again: bool) -> None:
    """Checks that a patch can be written, and overwrites nothing but itself.

    `again` says whether a job is resumed or restarted, whose own patch may be there. Raises InputError where it cannot.
    """
    for folder in (output, recording.output):
        if lies_in(patch, folder):
            raise InputError(
                f"the patch {patch} would lie in the output {folder}; name a place outside it with --patch"
            )
    partial = patch.with_name(patch.name + PARTIAL)
    try:
        for path in (patch, partial):
            mine = again and path.is_file() and (path == partial or _is_own(patch, output, recording))
            if path.exists() and not mine:
                raise InputError(f"{path} exists already; remove it, or name another patch with --patch")
        with tempfile.TemporaryFile(dir=patch.absolute().parent):
            pass
    except OSError as error:
        raise InputError(f"the patch {patch} cannot be written ({error}); name another place with --patch") from error


def _is_own(patch: Path, output: Path, recording: Recording) -> bool:
    """Returns whether a patch leads from the old output to the output that is there."""
    record = output / RECORD_FILE
    if not record.is_file():
        return False
    try:
        with open_patch(patch) as archive:
            manifest = read_manifest(archive, patch)
    except InputError:
        return False
    entry = manifest.files.get(RECORD_FILE)
    same_old = manifest.old_record_sha256 == recording.sha256
    return same_old and entry is not None and entry.sha256 == hashlib.sha256(read_file(record)).hexdigest()
