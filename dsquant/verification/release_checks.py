"""Verifies what `dsquant run` published: its own record, the reports, and every output in it."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from dsquant.errors import InputError
from dsquant.files.foreign import read_file
from dsquant.files.sealing import RELEASE_FILE, SECTIONS, broken_sections
from dsquant.files.strict_json import first_problem, read_json_object
from dsquant.jobs.folder_state import RECORD_FILE, WORK_FOLDER
from dsquant.jobs.ranks import ALONE, Ranks
from dsquant.jobs.stopping import not_resumable, stop_on_signals
from dsquant.reporting.progress import Progress, Report, silent
from dsquant.verification import checks
from dsquant.verification.checks import FileFinding, Verification, note_strays, read_parts
from dsquant.verification.damage import damage_in, parts_of
from dsquant.verification.strays import what_is_wrong
from dsquant.verification.strict_record import ReleaseRecord


def verify(
    folder: Path,
    source: str | None = None,
    everything: bool = False,
    report: Report = silent,
    ranks: Ranks = ALONE,
) -> Verification:
    """Checks an output, or a release with all its outputs, wherever it lies now.

    Arguments and errors are those of `checks.verify`; the folder may also be what `dsquant run` published.
    """
    with not_resumable("a verification"):
        if (folder / RECORD_FILE).exists() or what_is_wrong(folder, RELEASE_FILE) is not None:
            return checks.verify(folder, source, everything, report, ranks)
        return _verify_release(folder, source, everything, report, ranks)


def _verify_release(folder: Path, source: str | None, everything: bool, report: Report, ranks: Ranks) -> Verification:
    record, broken = _read_release(folder / RELEASE_FILE)
    found = Verification(str(folder), findings=broken)
    if broken:
        found.notes.append("nothing else was checked: the hashes of all files are in the damaged record")
        return found
    files: dict[str, dict[str, Any]] = record["files"]
    outputs = [str(PurePosixPath(name).parent) for name in files if PurePosixPath(name).name == RECORD_FILE]
    with stop_on_signals() as request:

        def safe_point(done: int, total: int, what: str) -> None:
            request.safe_point()
            report(Progress("verify", done, total, what, found.num_bytes))

        _check_files(folder, files, outputs, found, safe_point, ranks)
        for name in outputs:
            problem = what_is_wrong(folder, f"{name}/{RECORD_FILE}")
            if problem is None and (folder / name / WORK_FOLDER).exists():
                found.findings.append(FileFinding(f"{name}/{WORK_FOLDER}", "folder", "of an unfinished job"))
            elif problem is None:
                _merge(found, name, checks.verify(folder / name, source, everything, report, ranks))
    return found


def _read_release(path: Path) -> tuple[dict[str, Any], list[FileFinding]]:
    """Reads the record of a release, and where it is damaged."""
    parts = broken_sections(read_file(path))
    if parts == [SECTIONS] and read_json_object(path, finite=False).get("release_version") == 1:
        raise InputError(f"{path} is of an older dsquant, which kept no hashes there; verify the outputs next to it")
    if parts:
        return {}, [FileFinding(RELEASE_FILE, part, "the record is damaged") for part in parts]
    record = read_json_object(path, finite=False)
    try:
        ReleaseRecord.model_validate(record)
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}; `dsquant run` did not write this record") from error
    return record, []


def _check_files(
    folder: Path,
    files: dict[str, dict[str, Any]],
    outputs: list[str],
    found: Verification,
    safe_point: Callable[[int, int, str], None],
    ranks: Ranks,
) -> None:
    """Checks the files that no output's record lists, and that there are no others."""
    wrong = {name: problem for name in files if (problem := what_is_wrong(folder, name)) is not None}
    found.findings += [FileFinding(name, "file", problem) for name, problem in wrong.items()]
    note_strays(folder, {*files, RELEASE_FILE}, found, outputs)
    read = [part for name in files if name not in wrong for part in parts_of(folder, name, files)]
    damaged = read_parts(read, lambda part: damage_in(folder, part, files), found, safe_point, ranks)
    found.findings += [FileFinding(name, *part) for name, parts in damaged.items() for part in parts]


def _merge(found: Verification, name: str, part: Verification) -> None:
    """Adds the findings of one output of a release."""
    found.num_files, found.num_bytes = found.num_files + part.num_files, found.num_bytes + part.num_bytes
    found.source = found.source or part.source
    found.compared |= {f"{name}/{kind}": count for kind, count in part.compared.items()}
    findings = [FileFinding(f"{name}/{finding.file}", finding.where, finding.problem) for finding in part.findings]
    found.findings += [finding for finding in findings if finding not in found.findings]
    found.not_checked += [f"{name}/{check}" for check in part.not_checked]
    found.notes += [f"{name}: {note}" for note in part.notes]
