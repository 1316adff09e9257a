"""Jobs that survive a kill: an output folder held by one run, and its job begun, continued or removed.

One rename of the work folder turns an interrupted job into a finished one. Whatever is decided about a folder is
decided under its lock.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.files.disk import PARTIAL, remove_empty, remove_tree, sync_folder, write_atomically
from dsquant.jobs.folder_state import (
    EARLIER,
    JOB_FILE,
    RECORD_FILE,
    REMOVED_FOLDER,
    WORK_FOLDER,
    check_name,
    claim,
    claimed,
    found_in,
    read_job_notes,
    recorded_files,
)
from dsquant.jobs.journal import START_OVER, Journal, checked_line
from dsquant.jobs.locks import HOLDER_FILE, LOCK_FILE, exclusive
from dsquant.packages import version
from dsquant.recipes import Recipe

JOURNAL_FILE = "journal.jsonl"
# The unit that begins every job: a table is copied, and nothing is lost with it.
FIRST_UNIT = "embedding"


class Job:
    """An output folder that this run works on, and what is known of it."""

    def __init__(self, output: Path, work: Path, notes: dict[str, Any]) -> None:
        self.output = output
        self.work = work
        self.notes = notes
        """Noted when the job began: recipe, source, all that must not be looked up again on resume."""
        self.journal = Journal(work / JOURNAL_FILE, _job_key(notes))

    def note(self, **notes: Any) -> None:
        """Notes more about the job itself; when this returns it is on disk."""
        self.notes = {**self.notes, **notes}
        write_atomically(self.work / JOB_FILE, checked_line(self.notes))

    def finish(self) -> None:
        """Removes the work folder: from here on the output counts as finished."""
        remove_work(self.output)


def _job_key(notes: dict[str, Any]) -> str:
    """Names what a journal's lines depend on: recipe, source and version."""
    lasting = {key: notes[key] for key in ("recipe", "dsquant", "shards", "inputs")}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


@contextmanager
def held(output: Path, recipe: Recipe, resume: bool, restart: bool) -> Iterator[str]:
    """Holds an output folder for this run alone, from before anything is decided to the end; yields `claim`'s answer
    under the lock. A finished output is not locked: nothing will be done to it.

    Where the run ends before it has begun a job, or its job was refused for its input before more than the first unit
    was finished, nothing of it stays. Raises as `claim`, and InputError where another run works on the folder.
    """
    check_name(output)
    found = found_in(output)
    # Where there is a job, its run may be at work, and changing what one looks at: that is done under the lock alone.
    at_work = found == "interrupted" or (found == "foreign" and (output / WORK_FOLDER).exists())
    if not at_work and claimed(output, found, recipe, resume, restart) == "finished":
        remove_tree(output / REMOVED_FOLDER)
        yield "finished"
        return
    absent = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        with exclusive(output / WORK_FOLDER, output) as is_locked:
            try:
                state = claim(output, recipe, resume, restart)
                remove_tree(output / REMOVED_FOLDER)
                yield state
            finally:
                # Once a finished job's folder has been moved away, there may be another run's.
                if is_locked() and found_in(output) not in ("interrupted", "cleared"):
                    remove_work(output)
    finally:
        remove_empty(absent)


@contextmanager
def open_job(output: Path, recipe: Recipe, state: str, notes: dict[str, Any]) -> Iterator[Job]:
    """Begins or continues the job of a folder whose `state` is `held`'s; a new one notes `notes`, a resumed one has its
    own.

    A new job that is refused for its input leaves nothing, unless more than its first unit, a copied table, is
    finished: then the error says what is kept. Raises InputError where an interrupted job is damaged.
    """
    work = output / WORK_FOLDER
    if state == "resume":
        yield Job(output, work, read_job_notes(work / JOB_FILE))
        return
    _clear(output)
    notes = {"recipe": recipe.lasting(), "dsquant": version("dsquant"), **notes}
    write_atomically(work / JOB_FILE, checked_line(notes))
    for name in EARLIER.values():
        (work / name).unlink(missing_ok=True)
    try:
        yield Job(output, work, notes)
    except InputError as error:
        finished = Job(output, work, notes).journal.units  # several ranks, and so several jobs, may have written it
        if finished.keys() - {FIRST_UNIT}:
            raise InputError(f"{error} {len(finished)} finished units stay in {output}; {START_OVER}.") from error
        _discard(output)
        raise


def _discard(output: Path) -> None:
    """Removes a job, all that it has written, and the folders in which it did."""
    inside = {folder for path in recorded_files(output) for folder in path.parents if output in folder.parents}
    _clear(output)
    remove_work(output)
    remove_empty(sorted(inside, reverse=True))


def _clear(output: Path) -> None:
    """Removes what earlier jobs noted as their own, and nothing else.

    Their records are moved aside first and stay: a run that is killed here is followed by one that knows what is left
    to remove.
    """
    work = output / WORK_FOLDER
    for record, name in ((work / JOB_FILE, JOB_FILE), (output / RECORD_FILE, RECORD_FILE)):
        if record.is_file():
            record.replace(work / EARLIER[name])
    sync_folder(work)
    sync_folder(output)
    for path in recorded_files(output):
        path.unlink(missing_ok=True)
        path.with_name(path.name + PARTIAL).unlink(missing_ok=True)
    for path in work.iterdir():
        if path.name not in (LOCK_FILE, HOLDER_FILE, *EARLIER.values()):
            remove_tree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove_work(output: Path) -> None:
    """Removes the work folder of a locked output in one step; what a kill leaves of it lies under another name."""
    removed = output / REMOVED_FOLDER
    if not (output / WORK_FOLDER).exists():
        return
    remove_tree(removed)
    (output / WORK_FOLDER).replace(removed)
    sync_folder(output)
    remove_tree(removed)
