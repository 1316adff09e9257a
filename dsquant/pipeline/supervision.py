"""What every conversion does around its stages: limits, the claimed folder, a source that stays what it was."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.formats.table import check_decoder, format_of
from dsquant.jobs.folder import Job, open_job
from dsquant.jobs.folder_state import WORK_FOLDER
from dsquant.jobs.journal import START_OVER
from dsquant.jobs.ranks import ALONE, Ranks
from dsquant.jobs.resources import check_disk
from dsquant.jobs.stopping import StopRequest, memory_guard
from dsquant.packages import PACKAGES, version
from dsquant.pipeline.memory import check_memory
from dsquant.recipes import Recipe
from dsquant.reporting.progress import Limits, Progress, Report, resident_bytes
from dsquant.source.scan import sampled_hash, scan
from dsquant.source.shards import ShardIndex


@dataclass(frozen=True)
class Supervised:
    """A job that is about to begin or to continue."""

    recipe: Recipe
    state: str
    """What `held` found in the output folder."""
    index: ShardIndex
    """The source."""
    limits: Limits
    request: StopRequest
    report: Report
    ranks: Ranks = ALONE

    def check(self, memory_bytes: int, gpu_memory_bytes: int = 0) -> None:
        """Refuses a job that will not fit, from the memory it needs in addition to what is resident now.

        Raises PackageError where a package is missing that the job needs, be it at its end, UsageError where memory
        does not suffice, InputError where the disk does not.
        """
        limits, ranks = self.limits, self.ranks
        ranks.together(lambda: _check_packages(self.recipe))
        self.report(Progress("scan", 0, len(self.index), "", limits=limits))
        ranks.together(lambda: check_memory(memory_bytes, limits.memory_bytes, resident_bytes()))
        gpu_limit = limits.gpu_memory_bytes
        ranks.together(lambda: check_memory(gpu_memory_bytes, gpu_limit, 0, "--gpu-memory-budget"))
        ranks.once(lambda: check_disk(limits.output, limits.disk_bytes))

    @contextmanager
    def job(self, inputs: dict[str, str], notes: dict[str, Any]) -> Iterator[tuple[Job, Callable[[], None]]]:
        """Opens the job of a folder that is held, where its source is unchanged; yields the job and its safe point.

        `inputs`, from `input_hashes`, have to be the same when the job is resumed; `notes` are what a new job records
        of itself in addition. Raises InputError where tensors of finished units have changed, or the source is not the
        same for all ranks.
        """
        if self.ranks.size > 1:
            read = {"the model's tensors": sampled_hash(self.index), **inputs}
            self.ranks.check_alike(read, InputError, "give every rank the same files")
        within_budget = memory_guard(self.limits.memory_bytes, resident_bytes)

        def check() -> None:
            self.request.safe_point()
            within_budget()

        if self.state != "resume":
            notes = {"shards": shard_times(self.index), "inputs": inputs, **notes}
        with self._opened(notes if self.state != "resume" else {}) as job:
            check_inputs(job, inputs)
            self._check_unchanged(job, check)
            yield job, check

    @contextmanager
    def _opened(self, notes: dict[str, Any]) -> Iterator[Job]:
        recipe, ranks = self.recipe, self.ranks
        with ExitStack() as held:
            notes = ranks.once(lambda: held.enter_context(open_job(recipe.output, recipe, self.state, notes)).notes)
            work = recipe.output / WORK_FOLDER
            if ranks.size > 1:
                ranks.check_shared(work)
            yield Job(recipe.output, work, notes)

    def _check_unchanged(self, job: Job, check: Callable[[], None]) -> None:
        before = self.ranks.once(lambda: source_hashes(job))
        touched = self.ranks.once(lambda: bool(job.notes["shards"] != shard_times(self.index)))
        if touched and before != scan_source(self.index, list(before), self.report, check, self.ranks):
            raise InputError(
                f"{self.index.folder}: the source is not what it was when the job began; restore it, or start over "
                "with --restart"
            )


def _check_packages(recipe: Recipe) -> None:
    """Looks up now what a job's last steps import and record of other packages."""
    for name in (*PACKAGES, "gguf"):
        version(name)
    for name in recipe.to:
        if recipe.evaluate or format_of(name).encoded_by_package:
            check_decoder(name)


def input_hashes(config: Mapping[str, Any], calibration: Mapping[str, Any] | None, *files: Path) -> dict[str, str]:
    """Hashes what a job's bytes depend on besides its recipe and the source's tensors: name for messages -> SHA-256."""
    texts = {"the model's config.json": config, "the calibration texts": calibration}
    hashed = {name: json.dumps(value, sort_keys=True, default=str).encode() for name, value in texts.items()}
    hashed |= {str(file): file.read_bytes() for file in files}
    return {name: hashlib.sha256(content).hexdigest() for name, content in hashed.items()}


def check_inputs(job: Job, inputs: Mapping[str, str]) -> None:
    """Raises InputError where an input, from `input_hashes`, has changed since the job began."""
    before = job.notes["inputs"]
    changed = [name for name in inputs if before.get(name) != inputs[name]]
    if changed:
        raise InputError(
            f"{job.output}: {changed[0]}: not what the job began with; restore what has changed, or {START_OVER}"
        )


def source_hashes(job: Job) -> dict[str, str]:
    """Returns the SHA-256 of every stored tensor that finished units were made from."""
    return {name: found for entry in job.journal.units.values() for name, found in entry.get("source", {}).items()}


def scan_source(
    index: ShardIndex, names: Sequence[str], report: Report, check: Callable[[], None], ranks: Ranks
) -> dict[str, str]:
    """Returns the SHA-256 of stored tensors, in their order; each rank hashes its share, those that are there.

    `check` is called after every tensor, and may raise to stop.
    """
    own = [name for name in names if name in index][ranks.rank :: ranks.size]
    done = 0

    def after_tensor(name: str) -> None:
        nonlocal done
        check()
        done += 1
        report(Progress("scan", done, len(own), name, index.bytes_read))

    parts = ranks.gather(ranks.together(lambda: scan(index, after_tensor, own)))
    found = {name: digest for part in parts for name, digest in part.items()}
    return {name: found[name] for name in names if name in found}


def shard_times(index: ShardIndex) -> dict[str, list[int]]:
    """Size and time of change of every source file: where these are as before, a resumed job need not hash again."""
    found = {info.path.name: info.path.stat() for info in index.values()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(found.items())}
