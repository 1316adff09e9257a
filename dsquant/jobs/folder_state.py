"""What lies in an output folder, and what a run may do with it; nothing is changed here.

A folder is absent or empty; interrupted (its work folder holds a job's record); cleared (a run was killed while it made
room for another job); finished (it holds `dsquant.json` and none of those); or foreign.
"""

import os
import stat
from pathlib import Path
from typing import Any

from dsquant.errors import InputError, UsageError
from dsquant.files.disk import PARTIAL
from dsquant.files.foreign import LONGEST_NAME_BYTES, check_plain_files, own_path, read_file
from dsquant.files.strict_json import read_json_object
from dsquant.jobs.journal import START_OVER, read_checked_line
from dsquant.jobs.locks import HOLDER_FILE, LOCK_FILE
from dsquant.packages import version
from dsquant.recipes import CHANGEABLE_ON_RESUME, Recipe

WORK_FOLDER = ".dsquant-work"
# The work folder's name while it is removed.
REMOVED_FOLDER = ".dsquant-removed"
RECORD_FILE = "dsquant.json"
JOB_FILE = "job.json"
# Names of earlier jobs' records in the work folder while their files are removed.
EARLIER = {JOB_FILE: "earlier-job.json", RECORD_FILE: "earlier-dsquant.json"}
# Keys that every job's own record has; it may have more.
JOB_NOTES = ("recipe", "shards", "inputs", "files")


def claim(output: Path, recipe: Recipe, resume: bool, restart: bool) -> str:
    """Returns what a run may do with an output folder (`new`, `resume`, `restart` or `finished`); changes nothing.

    `resume` allows to continue an interrupted job, `restart` to start an interrupted or finished one over. The answer
    lasts only while the folder's lock is held: `held` asks again under it. Raises InputError where the folder holds
    something this run may not touch, or another version of dsquant began it, UsageError where the recipe differs from
    the interrupted job's.
    """
    check_name(output)
    return claimed(output, found_in(output), recipe, resume, restart)


def claimed(output: Path, found: str, recipe: Recipe, resume: bool, restart: bool) -> str:
    """Does what `claim` does, given what `found_in` returns."""
    if found == "absent":
        check_plain_files(output)
        return "new"
    if found == "foreign":
        raise InputError(f"{output} is not empty and was not created by dsquant; name another folder")
    if resume or restart:
        check_plain_files(output)
    if restart:
        recorded_files(output)
        return "restart"
    if not resume:
        state, advice = ("an interrupted job", "continue with --resume, ")
        if found == "finished":
            state, advice = "a finished output", ""
        raise InputError(
            f"{output} is not empty: it holds {state}; {advice}start over with --restart, or name another folder"
        )
    if found == "cleared":
        return "restart"
    if found == "finished":
        _check_same_recipe(output, recipe, _read_record(output / RECORD_FILE))
        return "finished"
    notes = read_job_notes(output / WORK_FOLDER / JOB_FILE)
    _check_same_recipe(output, recipe, notes)
    _check_same_version(output, notes)
    return "resume"


def found_in(output: Path) -> str:
    """Returns `absent`, `interrupted`, `cleared`, `finished` or `foreign` (see above); `absent` also after a run that
    was killed before it began. Raises InputError where something else has the name of a file or folder of dsquant's."""
    if not output.is_dir():
        return "absent"
    work = output / WORK_FOLDER
    names = {path.name for path in output.iterdir()}  # first: files of a run that begins meanwhile are nobody else's
    for folder in (work, output / REMOVED_FOLDER):
        if not _is_folder_or_absent(folder):
            raise InputError(f"{folder} is a link or a file, not a folder of dsquant's; remove it")
    for name in (LOCK_FILE, HOLDER_FILE, HOLDER_FILE + PARTIAL, JOB_FILE, *EARLIER.values()):
        if (work / name).is_dir():
            raise InputError(f"{work / name} is a folder, not a file of dsquant's; remove it")
    if (work / JOB_FILE).is_file():
        return "interrupted"
    if any((work / name).is_file() for name in EARLIER.values()):
        return "cleared"
    if (output / RECORD_FILE).is_file():
        return "finished"
    return "foreign" if names - {WORK_FOLDER, REMOVED_FOLDER} else "absent"


def _is_folder_or_absent(path: Path) -> bool:
    """Looks once: another run may be moving the folder away."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return True


def found_state(output: Path, recipe: Recipe, resume: bool, restart: bool) -> str:
    """Does what `claim` does, for a preview: dsquant's own output in the way is a state (`interrupted, in the way` or
    `finished, in the way`), not an error."""
    check_name(output)
    if not resume and not restart and (found := found_in(output)) not in ("absent", "foreign"):
        return "finished, in the way" if found == "finished" else "interrupted, in the way"
    return claim(output, recipe, resume, restart)


def check_name(output: Path) -> None:
    """Raises InputError where no folder can be made: its name cannot be one, or it or what it lies in is a file."""
    try:
        allowed = "\0" not in str(output) and all(len(os.fsencode(part)) <= LONGEST_NAME_BYTES for part in output.parts)
    except UnicodeEncodeError:
        allowed = False
    if not allowed:
        raise InputError(f"{str(output)!r:.300} cannot be a folder's name; give one that file systems allow")
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        kind = "a link that leads to no folder" if existing.is_symlink() else "a file"
        raise InputError(f"{existing} is {kind}; name a folder to make")


def _read_record(path: Path) -> dict[str, Any]:
    return read_json_object(path, "remove the folder yourself, or name another", finite=False)


def read_job_notes(path: Path) -> dict[str, Any]:
    """Reads the notes of an interrupted job; raises InputError where they are damaged."""
    notes = read_checked_line(read_file(path), str(path))
    missing = [key for key in JOB_NOTES if key not in notes]
    if missing:
        raise InputError(f"{path}: not a job's record, {', '.join(missing)} are not in it; {START_OVER}")
    return notes


def _check_same_recipe(output: Path, recipe: Recipe, record: dict[str, Any]) -> None:
    before, now = record.get("recipe"), recipe.lasting()
    if not isinstance(before, dict):
        raise InputError(f"{output}: its job's record has no recipe; remove the folder yourself, or name another")
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        details = ", ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed)
        raise UsageError(
            f"{output} was begun with another recipe: {details}. Only {', '.join(CHANGEABLE_ON_RESUME)} may change "
            "on --resume; start over with --restart or name another folder."
        )


def _check_same_version(output: Path, notes: dict[str, Any]) -> None:
    """Another release may round otherwise, and the output would be that of neither."""
    begun_by, this = notes.get("dsquant", "of an earlier version"), version("dsquant")
    if begun_by != this:
        raise InputError(
            f"{output} was begun by dsquant {begun_by}, this is {this}; install that version to continue, or "
            f"{START_OVER}"
        )


def recorded_files(output: Path) -> list[Path]:
    """Returns the files that the records in an output name as theirs, some of which may be gone; raises InputError
    where one is not a file of this folder."""
    work, found = output / WORK_FOLDER, []
    for record in (work / JOB_FILE, output / RECORD_FILE, *(work / name for name in EARLIER.values())):
        files = _read_record(record).get("files", []) if record.is_file() else []
        if not isinstance(files, list | dict):
            raise InputError(f"{record} is damaged: its 'files' are {files!r:.80}; remove the folder yourself")
        found += [own_path(output, name) for name in files]
    both = (one for path in found for one in (path, path.with_name(path.name + PARTIAL)))
    other = next((path for path in both if path.is_dir() or path.is_relative_to(work)), None)
    if other is not None:
        raise InputError(f"{output}: its record names {other}, which is not a file of it; remove the folder yourself")
    return found
