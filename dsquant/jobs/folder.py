"""Jobs that survive a kill: an output folder held by one run, a journal of finished units, safe points to stop at.

An output folder is absent or empty; interrupted (its work folder holds a job's record); cleared (a run was killed
while it made room for another job); finished (it holds `dsquant.json` and none of those); or foreign. One rename of the
work folder turns interrupted into finished. Whatever is decided about a folder is decided under its lock.
"""

import errno
import hashlib
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from dsquant.errors import InputError, Interrupted, UsageError
from dsquant.files.disk import NO_ROOM, PARTIAL, remove_empty, remove_tree, sync_folder, write_atomically
from dsquant.files.foreign import LONGEST_NAME_BYTES, check_plain_files, own_path, read_file
from dsquant.files.strict_json import read_json_object
from dsquant.jobs.journal import BEGIN_ANEW, Journal, checked_line, read_checked_line
from dsquant.jobs.locks import HOLDER_FILE, LOCK_FILE, exclusive
from dsquant.packages import version
from dsquant.recipes import CHANGEABLE_ON_RESUME, Recipe, format_size

WORK_FOLDER = ".dsquant-work"
# What the work folder is called while it is removed.
REMOVED_FOLDER = ".dsquant-removed"
RECORD_FILE = "dsquant.json"
JOB_FILE = "job.json"
JOURNAL_FILE = "journal.jsonl"
# What the records of earlier jobs are called in the work folder while their files are removed.
EARLIER = {JOB_FILE: "earlier-job.json", RECORD_FILE: "earlier-dsquant.json"}
# What a job's own record holds at least; more is its own affair.
JOB_NOTES = ("recipe", "tensors", "shards", "inputs", "files")
# The unit that begins every job: a table is copied, and nothing is lost with it.
FIRST_UNIT = "embedding"


class Job:
    """An output folder that this run works on, and what is known of it."""

    def __init__(self, output: Path, work: Path, notes: dict[str, Any]) -> None:
        self.output = output
        self.work = work
        self.notes = notes
        """What was noted when the job began: recipe, source, whatever must not be found anew on resume."""
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
    lasting = {key: notes[key] for key in ("recipe", "dsquant", "tensors", "shards", "inputs")}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


def claim(output: Path, recipe: Recipe, resume: bool, restart: bool) -> str:
    """Finds out what a run may do with an output folder; changes nothing.

    The answer lasts only while the folder's lock is held: `held` asks again under it.

    Args:
        output: the folder.
        recipe: the run's recipe.
        resume: whether an interrupted job may be continued.
        restart: whether an interrupted or finished job may be started over.

    Returns:
        `new`, `resume`, `restart` or `finished`.

    Raises:
        InputError: where the folder holds something this run may not touch, or another version of dsquant began it.
        UsageError: where the recipe differs from the interrupted job's.
    """
    check_name(output)
    return _claimed(output, found_in(output), recipe, resume, restart)


def _claimed(output: Path, found: str, recipe: Recipe, resume: bool, restart: bool) -> str:
    if found == "absent":
        check_plain_files(output)
        return "new"
    if found == "foreign":
        raise InputError(f"{output} is not empty and was not created by dsquant; name another folder")
    if resume or restart:
        check_plain_files(output)
    if restart:
        _recorded_files(output)
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
    notes = _read_job_notes(output / WORK_FOLDER / JOB_FILE)
    _check_same_recipe(output, recipe, notes)
    _check_same_version(output, notes)
    return "resume"


def found_in(output: Path) -> str:
    """Tells what lies in an output folder.

    Args:
        output: the folder.

    Returns:
        `absent` also where there is nothing but what a run leaves that was killed before it began; `interrupted`,
        `cleared`, `finished` or `foreign` (see above).

    Raises:
        InputError: where something else has the name of a file or folder of dsquant's.
    """
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
    """As `claim`, for a preview: dsquant's own output in the way is a state to tell of, not an error.

    Args:
        output: the folder.
        recipe: the run's recipe.
        resume: as in `claim`.
        restart: as in `claim`.

    Returns:
        What `claim` returns, or `interrupted, in the way` or `finished, in the way`.
    """
    check_name(output)
    if not resume and not restart and (found := found_in(output)) not in ("absent", "foreign"):
        return "finished, in the way" if found == "finished" else "interrupted, in the way"
    return claim(output, recipe, resume, restart)


def check_name(output: Path) -> None:
    """Refuses a path where no folder can be made.

    Args:
        output: the path.

    Raises:
        InputError: where its name cannot be one, or it or what it lies in is a file.
    """
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


def _read_job_notes(path: Path) -> dict[str, Any]:
    notes = read_checked_line(read_file(path), str(path))
    missing = [key for key in JOB_NOTES if key not in notes]
    if missing:
        raise InputError(f"{path}: not a job's record, {', '.join(missing)} are not in it; {BEGIN_ANEW}")
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
            f"{output} was begun by dsquant {begun_by}, this is {this}; install that version to go on, or {BEGIN_ANEW}"
        )


@contextmanager
def held(output: Path, recipe: Recipe, resume: bool, restart: bool) -> Iterator[str]:
    """Holds an output folder for this run alone, from before anything is decided to the end.

    Where the run ends before it has begun a job, or its job was refused for its input before a unit of worth was
    finished, nothing of it stays.

    Args:
        output: the folder.
        recipe: the run's recipe.
        resume: as in `claim`.
        restart: as in `claim`.

    Yields:
        What `claim` says under the lock. A finished output is not locked: nothing will be done to it.

    Raises:
        InputError: where another run works on the folder, and as `claim`.
        UsageError: as `claim`.
    """
    check_name(output)
    found = found_in(output)
    # Where there is a job, its run may be at work, and changing what one looks at: that is done under the lock alone.
    at_work = found == "interrupted" or (found == "foreign" and (output / WORK_FOLDER).exists())
    if not at_work and _claimed(output, found, recipe, resume, restart) == "finished":
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
    """Begins or continues the job of a folder that is `held`.

    A new job that is refused for its input leaves nothing, unless more than its first unit, a copied table, is
    finished.

    Args:
        output: the folder.
        recipe: the run's recipe.
        state: what `held` yielded.
        notes: what to note where the job is new; a resumed job has its own.

    Yields:
        The job.

    Raises:
        InputError: where an interrupted job is damaged; and what is raised inside: a job that has begun here and has
            no layer in its journal yet then leaves nothing, and the error of any other says what is kept.
    """
    work = output / WORK_FOLDER
    if state == "resume":
        yield Job(output, work, _read_job_notes(work / JOB_FILE))
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
            raise InputError(f"{error} {len(finished)} finished units stay in {output}; {BEGIN_ANEW}.") from error
        _discard(output)
        raise


def _discard(output: Path) -> None:
    """Removes a job, all that it has written, and the folders in which it did."""
    inside = {folder for path in _recorded_files(output) for folder in path.parents if output in folder.parents}
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
    for path in _recorded_files(output):
        path.unlink(missing_ok=True)
        path.with_name(path.name + PARTIAL).unlink(missing_ok=True)
    for path in work.iterdir():
        if path.name not in (LOCK_FILE, HOLDER_FILE, *EARLIER.values()):
            remove_tree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _recorded_files(output: Path) -> list[Path]:
    """Returns the files that the records in an output name as theirs; refuses what is not a file of this folder."""
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


def remove_work(output: Path) -> None:
    """Removes the work folder in one step; what a kill leaves of it lies under another name, for whoever comes next.

    Args:
        output: the output folder; its lock is held.
    """
    removed = output / REMOVED_FOLDER
    if not (output / WORK_FOLDER).exists():
        return
    remove_tree(removed)
    (output / WORK_FOLDER).replace(removed)
    sync_folder(output)
    remove_tree(removed)


class StopRequest:
    """Remembers SIGTERM, SIGHUP and SIGINT until the next safe point."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: now
        self._signal = number

    def safe_point(self) -> None:
        """Stops the job here if a signal has asked for it.

        Raises:
            Interrupted: where a signal has come.
        """
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise Interrupted(f"stopped by {name} at a safe point; continue with --resume")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns SIGTERM, SIGHUP and SIGINT into a request that safe points obey; the old handlers return afterwards.

    A signal that is ignored, as SIGHUP under nohup, stays so.

    Yields:
        The request. Outside the main thread, where Python sets no handlers, nothing ever sets it.
    """
    import threading

    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(outer, StopRequest):  # inside a longer job: what was asked of that is asked of this
        yield outer
        return
    numbers = (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, request._note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def full_disk_is_resumable(
    then: str = "finished units are kept: make room and continue with --resume",
) -> Iterator[None]:
    """Turns a full disk into a stop that can be resumed.

    Args:
        then: what is kept, and what to do.

    Yields:
        Nothing.

    Raises:
        Interrupted: where the disk or the quota is full, or a file may grow no further.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        what = "a limit on file sizes is reached (ulimit -f)" if error.errno == errno.EFBIG else "the disk is full"
        raise Interrupted(f"{what}: {error.filename or error}; {then}") from error


def memory_guard(budget_bytes: int, resident_bytes: Callable[[], int]) -> Callable[[], None]:
    """Makes a check that stops the job when it outgrows its budget.

    Args:
        budget_bytes: the most resident memory.
        resident_bytes: measures it.

    Returns:
        A function that raises `Interrupted` above the budget.
    """

    def check() -> None:
        found = resident_bytes()
        if found > budget_bytes:
            raise Interrupted(
                f"resident memory is {format_size(found)}, the budget {format_size(budget_bytes)}; "
                "continue with --resume and a larger --memory-budget"
            )

    return check
