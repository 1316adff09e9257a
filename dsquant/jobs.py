"""Jobs that survive a kill: a claimed output folder, a journal of finished units, safe points to stop at.

An output folder is in one of four states: absent or empty; interrupted (it holds `.dsquant-work`); finished (it holds
`dsquant.json` and no work folder); or somebody else's. Only the work folder's removal turns interrupted into finished.
"""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from dsquant.disk import PARTIAL, write_atomically
from dsquant.errors import InputError, Interrupted, UsageError
from dsquant.locks import HOLDER_FILE, LOCK_FILE, exclusive
from dsquant.packages import version
from dsquant.recipe import CHANGEABLE_ON_RESUME, JobRecipe, format_size
from dsquant.strict_json import parse_json, read_json_object

WORK_FOLDER = ".dsquant-work"
RECORD_FILE = "dsquant.json"
JOB_FILE = "job.json"
JOURNAL_FILE = "journal.jsonl"
# What to do where an interrupted job is damaged.
BEGIN_ANEW = "begin anew with --restart"
# What a job's own record holds at least; more is its own affair.
JOB_NOTES = ("recipe", "tensors", "shards", "files")
LONGEST_NAME_BYTES = 255


class Journal:
    """An append-only file with one JSON line for each finished unit."""

    def __init__(self, path: Path) -> None:
        """Reads what is there; a line that a kill cut off does not count, and is cut away.

        Args:
            path: the journal's file.

        Raises:
            InputError: where a line is damaged.
        """
        self._path = path
        raw = path.read_bytes() if path.exists() else b""
        complete = raw[: raw.rfind(b"\n") + 1]
        if complete != raw:
            os.truncate(path, len(complete))
        lines = complete.split(b"\n")[:-1]
        self._entries = [_entry(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]

    @property
    def units(self) -> dict[str, dict[str, Any]]:
        """Unit -> what was noted of it."""
        return {entry["unit"]: entry for entry in self._entries}

    def append(self, unit: str, **notes: Any) -> None:
        """Notes a finished unit; when this returns the line is on disk."""
        entry = {"unit": unit, **notes}
        with self._path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._entries.append(entry)


def _entry(line: bytes, where: str) -> dict[str, Any]:
    entry = parse_json(line, where, BEGIN_ANEW, finite=False)
    if not isinstance(entry, dict) or not isinstance(entry.get("unit"), str):
        raise InputError(f"{where}: no line of a journal, which names a 'unit': {entry!r:.80}; {BEGIN_ANEW}")
    return entry


class Job:
    """A claimed output folder."""

    def __init__(self, output: Path, work: Path, notes: dict[str, Any]) -> None:
        self.output = output
        self.work = work
        self.notes = notes
        """What was noted when the job began: recipe, source, whatever must not be found anew on resume."""
        self.journal = Journal(work / JOURNAL_FILE)

    def note(self, **notes: Any) -> None:
        """Notes more about the job itself; when this returns it is on disk."""
        self.notes = {**self.notes, **notes}
        write_atomically(self.work / JOB_FILE, json.dumps(self.notes).encode())

    def finish(self) -> None:
        """Removes the work folder: from here on the output counts as finished."""
        shutil.rmtree(self.work)


def claim(output: Path, recipe: JobRecipe, resume: bool, restart: bool) -> str:
    """Finds out what a run may do with an output folder; changes nothing.

    Args:
        output: the folder.
        recipe: the run's recipe.
        resume: whether an interrupted job may be continued.
        restart: whether an interrupted or finished job may be begun anew.

    Returns:
        `new`, `resume`, `restart` or `finished`.

    Raises:
        InputError: where the folder holds something this run may not touch, or another version of dsquant began it.
        UsageError: where the recipe differs from the interrupted job's.
    """
    check_name(output)
    if not output.exists() or not any(output.iterdir()):
        return "new"
    interrupted = (output / WORK_FOLDER).is_dir()
    if not interrupted and not (output / RECORD_FILE).is_file():
        raise InputError(f"{output} is not empty and no output of dsquant; name another folder")
    if restart:
        return "restart"
    if not resume:
        state, advice = ("an interrupted job", "go on with --resume, ") if interrupted else ("a finished output", "")
        raise InputError(
            f"{output} is not empty: it holds {state}; {advice}begin anew with --restart, or name another folder"
        )
    if interrupted and not (output / WORK_FOLDER / JOB_FILE).is_file():
        return "restart"  # killed before the job's own record was on disk: nothing to continue
    record = _read_record(output / WORK_FOLDER / JOB_FILE if interrupted else output / RECORD_FILE)
    _check_same_recipe(output, recipe, record)
    if interrupted:
        _check_same_version(output, record)
    return "resume" if interrupted else "finished"


def found_state(output: Path, recipe: JobRecipe, resume: bool, restart: bool) -> str:
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
    if not resume and not restart and output.is_dir():
        if (output / WORK_FOLDER).is_dir():
            return "interrupted, in the way"
        if (output / RECORD_FILE).is_file():
            return "finished, in the way"
    return claim(output, recipe, resume, restart)


def check_name(output: Path) -> None:
    """Refuses a path where no folder can be made.

    Args:
        output: the path.

    Raises:
        InputError: where its name cannot be one, or it or what it lies in is a file.
    """
    if "\0" in str(output) or any(len(os.fsencode(part)) > LONGEST_NAME_BYTES for part in output.parts):
        raise InputError(f"{str(output)!r:.300} cannot be a folder's name; give one that file systems allow")
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"{existing} is a file; name a folder to make")


def _read_record(path: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    then = "remove the folder yourself, or name another"
    record = read_json_object(path, then, finite=False)
    missing = [key for key in keys if key not in record]
    if missing:
        raise InputError(f"{path} is damaged: {', '.join(missing)} are not in it; {then}")
    return record


def _check_same_recipe(output: Path, recipe: JobRecipe, record: dict[str, Any]) -> None:
    before, now = record.get("recipe"), recipe.lasting()
    if not isinstance(before, dict):
        raise InputError(f"{output}: its job's record has no recipe; remove the folder yourself, or name another")
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        details = ", ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed)
        raise UsageError(
            f"{output} was begun with another recipe: {details}. Only {', '.join(CHANGEABLE_ON_RESUME)} may change "
            "on --resume; begin anew with --restart or name another folder."
        )


def _check_same_version(output: Path, notes: dict[str, Any]) -> None:
    """Another release may round otherwise, and the output would be that of neither."""
    begun_by, this = notes.get("dsquant", "of an earlier version"), version("dsquant")
    if begun_by != this:
        raise InputError(
            f"{output} was begun by dsquant {begun_by}, this is {this}; install that version to go on, or {BEGIN_ANEW}"
        )


@contextmanager
def open_job(output: Path, recipe: JobRecipe, state: str, notes: dict[str, Any]) -> Iterator[Job]:
    """Takes the output folder for this run, alone.

    Args:
        output: the folder.
        recipe: the run's recipe.
        state: what `claim` returned.
        notes: what to note where the job is new; a resumed job has its own.

    Yields:
        The job.

    Raises:
        InputError: where another run works on the folder.
    """
    work = output / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    with exclusive(work, output):
        if state == "restart":
            _remove_recorded_files(output)
        if state == "resume":
            notes = _read_record(work / JOB_FILE, JOB_NOTES)
        else:
            notes = {"recipe": recipe.lasting(), "dsquant": version("dsquant"), **notes}
            write_atomically(work / JOB_FILE, json.dumps(notes).encode())
        yield Job(output, work, notes)


def _remove_recorded_files(output: Path) -> None:
    """Removes the files that a job noted as its own, and nothing else."""
    for record_path in (output / WORK_FOLDER / JOB_FILE, output / RECORD_FILE):
        files = _read_record(record_path).get("files", []) if record_path.is_file() else []
        for name in files:
            path = output / name
            if ".." not in Path(name).parts and not Path(name).is_absolute():
                path.unlink(missing_ok=True)
                path.with_name(path.name + PARTIAL).unlink(missing_ok=True)
    (output / RECORD_FILE).unlink(missing_ok=True)
    for path in (output / WORK_FOLDER).iterdir():
        if path.name not in (LOCK_FILE, HOLDER_FILE):
            path.unlink()


class StopRequest:
    """Remembers SIGTERM and SIGINT until the next safe point."""

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
            raise Interrupted(f"stopped by {name} at a safe point; go on with --resume")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns SIGTERM and SIGINT into a request that safe points obey; the old handlers return afterwards.

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
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, request._note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def full_disk_is_resumable() -> Iterator[None]:
    """Turns a full disk into a stop that can be resumed.

    Raises:
        Interrupted: where the disk or the quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Interrupted(
            f"the disk is full ({error.filename or error}); finished units are kept: make room and go on with --resume"
        ) from error


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
                "go on with --resume and a larger --memory-budget"
            )

    return check
