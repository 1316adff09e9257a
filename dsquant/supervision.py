"""What every conversion does around its stages: limits, the claimed folder, a source that stays what it was."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from dsquant.distributed import ALONE, Ranks
from dsquant.errors import InputError
from dsquant.jobs import WORK_FOLDER, Job, StopRequest, memory_guard, open_job
from dsquant.memory import check_memory
from dsquant.packages import PACKAGES, version
from dsquant.preparation import check_disk
from dsquant.recipe import JobRecipe, Recipe
from dsquant.source.quantized import check_decoder
from dsquant.source.scan import scan
from dsquant.source.shards import ShardIndex
from dsquant.telemetry import Limits, Progress, Report, resident_bytes


@dataclass(frozen=True)
class Supervised:
    """A job that is about to begin or to go on."""

    recipe: JobRecipe
    state: str
    """What `claim` found in the output folder."""
    index: ShardIndex
    """The source."""
    limits: Limits
    request: StopRequest
    report: Report
    ranks: Ranks = ALONE

    def check(self, memory_bytes: int, gpu_memory_bytes: int = 0) -> None:
        """Refuses a job that will not fit.

        Args:
            memory_bytes: what it needs beside what is resident now.
            gpu_memory_bytes: what it needs on a GPU.

        Raises:
            PackageError: where a package is missing that the job needs, be it at its end.
            UsageError: where memory does not suffice.
            InputError: where the disk does not.
        """
        limits, ranks = self.limits, self.ranks
        ranks.together(lambda: _check_packages(self.recipe))
        self.report(Progress("scan", 0, len(self.index), "", limits=limits))
        ranks.together(lambda: check_memory(memory_bytes, limits.memory_bytes, resident_bytes()))
        gpu_limit = limits.gpu_memory_bytes
        ranks.together(lambda: check_memory(gpu_memory_bytes, gpu_limit, 0, "--gpu-memory-budget"))
        ranks.once(lambda: check_disk(limits.output, limits.disk_bytes))

    @contextmanager
    def job(self, notes: dict[str, Any]) -> Iterator[tuple[Job, Callable[[], None]]]:
        """Claims the output, and hashes the source or finds it unchanged.

        Args:
            notes: what a new job keeps about itself beside the source's hashes.

        Yields:
            The job, whose lock rank 0 holds for all, and what stops it at a safe point where it has to.

        Raises:
            InputError: where the source is damaged, or not what it was when the job began.
            Interrupted: where the job was asked to stop.
        """
        within_budget = memory_guard(self.limits.memory_bytes, resident_bytes)

        def check() -> None:
            self.request.safe_point()
            within_budget()

        if self.state != "resume":
            hashes = scan_source(self.index, self.report, check, self.ranks)
            notes = {"tensors": hashes, "shards": shard_times(self.index), **notes}
        with self._opened(notes if self.state != "resume" else {}) as job:
            self._check_unchanged(job.notes, check)
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

    def _check_unchanged(self, notes: dict[str, Any], check: Callable[[], None]) -> None:
        touched = self.ranks.once(lambda: bool(notes["shards"] != shard_times(self.index)))
        if touched and notes["tensors"] != scan_source(self.index, self.report, check, self.ranks):
            raise InputError(
                f"{self.index.folder}: the source is not what it was when the job began; restore it, or begin anew "
                "with --restart"
            )


def _check_packages(recipe: JobRecipe) -> None:
    """Looks up now what a job's last steps import and record of other packages."""
    for name in (*PACKAGES, "gguf"):
        version(name)
    written = recipe.to if isinstance(recipe, Recipe) else ("gguf",)
    decoded = written if isinstance(recipe, Recipe) and recipe.evaluate else ()
    for name in {*decoded, *(name for name in written if name.startswith("gguf"))}:
        check_decoder(name)


def scan_source(index: ShardIndex, report: Report, check: Callable[[], None], ranks: Ranks = ALONE) -> dict[str, str]:
    """Hashes every stored tensor, each rank its share.

    Args:
        index: the source.
        report: gets the progress.
        check: called after every tensor; it may raise to stop.
        ranks: all ranks.

    Returns:
        Tensor name -> SHA-256, in the index's order.
    """
    own = list(index.values())[ranks.rank :: ranks.size]
    done = 0

    def after_tensor(name: str) -> None:
        nonlocal done
        check()
        done += 1
        report(Progress("scan", done, len(own), name, index.bytes_read))

    parts = ranks.gather(ranks.together(lambda: scan(index, after_tensor, own)))
    found = {name: digest for part in parts for name, digest in part.items()}
    return {name: found[name] for name in index}


def shard_times(index: ShardIndex) -> dict[str, list[int]]:
    """Size and time of change of every source file: where these are as before, a resumed job need not hash again."""
    found = {info.path.name: info.path.stat() for info in index.values()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(found.items())}
