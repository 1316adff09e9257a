"""Verifies an output: its record, every byte of every file, its contents, and its values against the source."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from dsquant.errors import InputError, UsageError
from dsquant.escaping import counted
from dsquant.files.foreign import read_file
from dsquant.files.sealing import RELEASE_FILE, broken_sections, in_threads, record_of_folder, seal
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.formats.gguf.gguf_weights import GgufWeights
from dsquant.formats.gguf.layout import placements
from dsquant.formats.scales import open_scales
from dsquant.formats.table import SAFETENSORS
from dsquant.jobs.folder_state import RECORD_FILE, found_in
from dsquant.jobs.ranks import ALONE, Ranks, dealt
from dsquant.jobs.stopping import stop_on_signals
from dsquant.options import format_size
from dsquant.reporting.notebook import Shown, table_of
from dsquant.reporting.progress import Progress, Report, silent
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.locate import EMBEDDED_MODEL, locate
from dsquant.source.weights import Weights
from dsquant.verification.contents import check_checkpoint, check_gguf
from dsquant.verification.damage import Damage, Part, damage_in, parts_of
from dsquant.verification.decoded_values import (
    OpenedOutput,
    SourceComparison,
    chosen_parameters,
    compared_source,
    problems_of,
    share_of,
    undecodable,
    wrong_value,
)
from dsquant.verification.strays import NOT_PART, list_strays, printable, what_is_wrong
from dsquant.verification.strict_record import read_record


@dataclass(frozen=True)
class FileFinding:
    """A difference from what was written."""

    file: str
    """Path in the output folder."""
    where: str
    """The tensor, or the region of the file."""
    problem: str


@dataclass
class Verification(Shown):
    """Results of a verification."""

    folder: str
    num_files: int = 0
    num_bytes: int = 0
    source: str | None = None
    """The model that values were compared with; None where none were."""
    compared: dict[str, int] = field(default_factory=dict)
    """Format -> parameters whose values were compared."""
    findings: list[FileFinding] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    """Checks that could not be run because a package that they need cannot be imported: neither passed nor failed."""
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there are no findings, and every check was run."""
        return not self.findings and not self.not_checked

    def as_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {"ok": self.ok, **asdict(self)}

    def tables(self) -> Iterator[Any]:
        """Yields the table of findings, then what was read, compared and left out."""
        from rich.text import Text

        if self.findings:
            title, headings = f"{self.folder} differs from what was written", ("file", "where", "problem")
            rows = ((Text(finding.file), Text(finding.where), Text(finding.problem)) for finding in self.findings)
            yield table_of(title, headings, rows, left=3, title_justify="left")
        files, findings = counted(self.num_files, "file"), counted(len(self.findings), "finding")
        yield Text(f"{files}, {format_size(self.num_bytes)} read; {findings}.")
        for name, number in self.compared.items():
            yield Text(f"{name}: {counted(number, 'parameter')} decoded and compared with {self.source}.")
        for check in self.not_checked:
            yield Text(f"Not checked: {check}.")
        for note in self.notes:
            yield Text(f"Note: {note}.")


def verify(
    folder: Path,
    source: str | None = None,
    everything: bool = False,
    report: Report = silent,
    ranks: Ranks = ALONE,
) -> Verification:
    """Checks an output of one job, wherever it lies now: its folder, or one format's folder in it. All ranks call this,
    read a share of the files and of the tensors each, and get all findings.

    `source` is the model that it was made from; None takes the recorded one where it is on this machine. `everything`
    compares every parameter's values with the source's, not a sample. Raises InputError where it is not a finished
    output of dsquant, or the source is a different one; UsageError where `everything` has no source.
    """
    _check_finished(folder)
    found = Verification(str(folder))
    raw = read_file(folder / RECORD_FILE)
    found.findings += [FileFinding(RECORD_FILE, part, "the record is damaged") for part in broken_sections(raw)]
    if found.findings:
        found.notes.append("nothing else was checked: the hashes of all files are in the damaged record")
        return found
    record = read_record(folder / RECORD_FILE)
    with stop_on_signals() as request:

        def safe_point(done: int, total: int, what: str) -> None:
            request.safe_point()
            report(Progress("verify", done, total, what, found.num_bytes))

        original = ranks.together(lambda: _open_source(source, record, everything, found))
        damaged = _check_files(folder, record, found, safe_point, ranks)
        for name, output in record["outputs"].items():
            home = _home(output)
            if any(PurePosixPath(file).parent == home for file in damaged):
                continue
            try:
                candidate = _check_contents(folder, name, record, original, found)
                if candidate is None:
                    continue
                chosen = chosen_parameters(candidate, everything)
                comparison, problem = compared_source(original, record, candidate, chosen, ranks)
                _note_other_source(problem, source, found)
                wrong = _wrong(candidate, comparison, chosen, safe_point, ranks)
                found.compared |= {name: len(chosen)} if comparison is not None else {}
                found.findings += [
                    FileFinding(_file_of(record, name, home, part), repr(part), text) for part, text in wrong
                ]
            except ImportError as error:
                found.not_checked.append(f"{name}, beyond the bytes of its files: {error}")
    return found


def _home(output: Mapping[str, Any]) -> PurePosixPath:
    """The folder of one format's files."""
    inside = PurePosixPath(output["folder"])
    return inside.parent if inside.suffix == ".gguf" else inside


def _check_finished(folder: Path) -> None:
    """Raises InputError where a folder is not a finished output."""
    if folder.is_file():
        raise InputError(f"{folder} is a file; verify the folder that it is in, {folder.parent}")
    if found_in(folder) in ("interrupted", "cleared"):
        raise InputError(f"{folder} holds an interrupted job; finish it with --resume")
    problem = what_is_wrong(folder, RECORD_FILE)
    if problem is not None:
        below = [*folder.glob(f"*/{RECORD_FILE}"), *folder.glob(f"current/{RELEASE_FILE}")]
        known = ", ".join(sorted(str(path.parent) for path in below))
        advice = f"verify {known}" if known else "is this an output of dsquant?"
        raise InputError(f"{folder / RECORD_FILE} is {problem}; {advice}")


def _open_source(
    source: str | None, record: dict[str, Any], everything: bool, found: Verification
) -> Checkpoint | None:
    """Opens the model to compare with; a recorded hub id is not downloaded."""
    recorded = record["recipe"]["model"]
    here = Path(recorded).expanduser().is_dir() or recorded == EMBEDDED_MODEL
    if source is None and not here:
        if everything:
            raise UsageError(f"--all compares with the source, and {recorded!r} is not here; name it with --source")
        found.notes.append(f"values were not compared: the source {recorded!r} is not here; name it with --source")
        return None
    if source is not None:
        found.source = source
        return open_checkpoint(locate(source))
    try:
        original = open_checkpoint(locate(recorded))
    except InputError as error:
        found.notes.append(f"values were not compared: {error}")
        return None
    found.source = recorded
    return original


def _check_files(
    folder: Path,
    record: dict[str, Any],
    found: Verification,
    safe_point: Callable[[int, int, str], None],
    ranks: Ranks,
) -> set[str]:
    """Checks every byte of every file, and that there are no others; returns files that are damaged, missing or
    strays."""
    files: dict[str, dict[str, Any]] = record["files"]
    wrong = {name: problem for name in files if (problem := what_is_wrong(folder, name)) is not None}
    there = [name for name in files if name not in wrong]
    found.findings += [FileFinding(printable(name), "file", problem) for name, problem in wrong.items()]
    strays = note_strays(folder, {*files, RECORD_FILE}, found)
    parts = [part for name in there for part in parts_of(folder, name, files)]
    damaged = read_parts(parts, lambda part: damage_in(folder, part, files), found, safe_point, ranks)
    for name in there:
        if not damaged[name] and PurePosixPath(name).name == RECORD_FILE:
            part = record_of_folder(record, PurePosixPath(name).parent, RECORD_FILE)
            if read_file(folder / name) != seal(part):
                damaged[name] = [
                    ("content", f"differs from what {RECORD_FILE} of the whole output lists of its folder")
                ]
        found.findings += [FileFinding(printable(name), *part) for part in damaged[name]]
    return {*wrong, *strays, *(name for name in there if damaged[name])}


def read_parts(
    parts: Sequence[Part],
    damage_in: Callable[[Part], Damage],
    found: Verification,
    safe_point: Callable[[int, int, str], None],
    ranks: Ranks,
) -> dict[str, Damage]:
    """Reads parts of files, each rank a share of their bytes; returns the damage in each file."""
    own = dealt([part.num_bytes for part in parts], ranks.size)[ranks.rank]
    before, done = found.num_bytes, 0

    def after_part(number: int) -> None:
        nonlocal done
        done, found.num_bytes = done + 1, found.num_bytes + parts[number].num_bytes
        safe_point(done, len(own), parts[number].name)

    of_ranks = ranks.gather(in_threads(lambda number: damage_in(parts[number]), own, after_part))
    damage = {number: wrong for of_rank in of_ranks for number, wrong in of_rank.items()}
    damaged: dict[str, Damage] = {part.name: [] for part in parts}
    found.num_files, found.num_bytes = found.num_files + len(damaged), before + sum(part.num_bytes for part in parts)
    for number, part in enumerate(parts):
        damaged[part.name] += damage[number]
    return damaged


def note_strays(folder: Path, names: set[str], found: Verification, checked: Collection[str] = ()) -> set[str]:
    """Adds findings for everything in a folder that is not in `names`, and notes on files of git and the hub's client.

    Folders in `checked` are checked separately. Returns the paths of the findings.
    """
    listing = list_strays(folder, names, checked)
    found.findings += [FileFinding(printable(path), "file", problem) for path, problem in listing.strays.items()]
    for home, sizes in listing.kept_by_others.items():
        size = f"{counted(len(sizes), 'file')}, {format_size(sum(sizes))}"
        found.notes.append(f"{home} ({size}) belongs to git or the hub's client: {NOT_PART}, and not checked")
    return {str(path) for path in listing.strays}


def _check_contents(
    folder: Path, name: str, record: dict[str, Any], original: Checkpoint | None, found: Verification
) -> OpenedOutput | None:
    """Checks the contents of one format, whose files are intact; returns it opened, None where it cannot be decoded."""
    output = record["outputs"][name]
    inside = PurePosixPath(output["folder"])
    is_gguf = inside.suffix == ".gguf"
    weights: Weights | None = None
    if is_gguf:
        problems = check_gguf(folder, inside, record)
        if original is not None and not problems:
            shapes = {parameter: original.weights.shape(parameter) for parameter in original.weights}
            weights = GgufWeights(folder / inside, shapes, original.config)
    else:
        checkpoint, problems = check_checkpoint(folder, inside, record)
        weights = checkpoint.weights if checkpoint else None
    found.findings += [FileFinding(*problem) for problem in problems]
    if weights is None or problems:
        return None
    scales = open_scales(folder / (inside.parent if is_gguf else inside))
    return OpenedOutput(weights, scales, output["weight_errors"], is_gguf)


def _wrong(
    candidate: OpenedOutput,
    comparison: SourceComparison | None,
    chosen: list[str],
    safe_point: Callable[[int, int, str], None],
    ranks: Ranks,
) -> list[tuple[str, str]]:
    """Decodes parameters, each rank its share, and compares them with the source where it is there; returns parameter
    and problem. Raises ImportError on all ranks where one cannot import a format's package."""
    done, own = 0, share_of(candidate, chosen, ranks)

    def after(parameter: str) -> None:
        nonlocal done
        done += 1
        safe_point(done, len(own), parameter)

    check = undecodable if comparison is None else partial(wrong_value, comparison)
    wrong, missing = dict[str, str](), None
    try:
        wrong = problems_of(candidate.weights, own, lambda parameter: check(candidate, parameter), after)
    except ImportError as error:
        missing = str(error)
    parts = ranks.gather((wrong, missing))
    for _, without in parts:
        if without is not None:
            raise ImportError(without)
    problems = {name: problem for found, _ in parts for name, problem in found.items()}
    return [(name, problems[name]) for name in chosen if name in problems]


def _note_other_source(problem: str | None, named: str | None, found: Verification) -> None:
    """Raises InputError where the caller has named the source that is a different one."""
    if problem is None:
        return
    if named is not None:
        raise InputError(problem)
    found.source = None
    found.notes.append(f"values were not compared: {problem} with --source")


def _file_of(record: dict[str, Any], format_name: str, home: PurePosixPath, parameter: str) -> str:
    """Returns the file that holds a parameter, or the first of the tensors that it became."""
    prefix = parameter.removesuffix("weight")
    stack = SAFETENSORS[format_name].stack_of(parameter) if format_name in SAFETENSORS else None
    places = (
        {stack[0]} if stack else {place.tensor for place in placements(parameter, record["source"]["architecture"])}
    )
    for name, entry in record["files"].items():
        held = entry.get("tensors", {}) if PurePosixPath(name).parent == home else {}
        if places.intersection(held) or any(tensor.startswith(prefix) for tensor in held):
            return str(name)
    return str(home)
