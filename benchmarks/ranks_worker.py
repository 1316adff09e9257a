"""One rank of a process group that runs dsquant's commands for benchmarks/r1_ranks, one after the other.

Rank 0 reads a command's arguments from its standard input, a line of JSON; every rank runs `dsquant` with them, and
writes what it took to the path in RANKS_RESULT. Imports, CUDA's start and the joining of ranks happen once, before
anything is timed.
"""

import contextlib
import gc
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dsquant.cli import main as cli
from dsquant.evaluation.reading import SideStream
from dsquant.formats.gguf.shared_hashes import SharedHashes
from dsquant.formats.write_behind import WriteBehind
from dsquant.jobs import ranks as ranks_module
from dsquant.jobs.ranks import Ranks, joined
from dsquant.pipeline import units, writers
from dsquant.reporting import terminal
from dsquant.reporting.progress import Progress
from dsquant.source.read_ahead import ReadAhead
from dsquant.source.shards import ShardIndex

SAMPLED_S = 0.05


class Clock:
    """Where the main thread of a rank is: each moment counts for the innermost of the named blocks around it."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, float, float]] = []
        self._inside: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._cut()
        self._inside.append(name)
        try:
            yield
        finally:
            self._cut()
            self._inside.pop()

    def _cut(self) -> None:
        now = time.monotonic()
        if self._inside:
            self.spans.append((self._inside[-1], self._since, now))
        self._since = now

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Times a function of a class or module."""
        function: Callable[..., Any] = getattr(owner, attribute)

        def run(*arguments: Any, **named: Any) -> Any:
            with self.timed(name):
                return function(*arguments, **named)

        setattr(owner, attribute, run)


def watch(clock: Clock) -> None:
    """Has the clock follow what a rank waits for: the disk, the other ranks, rank 0."""
    for owner, attribute in ((ShardIndex, "read"), (ReadAhead, "take"), (units, "hash_unit")):
        clock.wrap(owner, attribute, "reading")
    clock.wrap(SideStream, "queued", "kernels")
    clock.wrap(SharedHashes, "_own", "hashing")
    for owner, attribute in ((WriteBehind, "write"), (WriteBehind, "wait"), (writers.Writers, "finish")):
        clock.wrap(owner, attribute, "writing")
    exchange, alone = Ranks._exchange, Ranks.alone

    @contextlib.contextmanager
    def timed_exchange(self: Ranks, tensor: torch.Tensor | None = None) -> Iterator[None]:
        waits = not self.first and "alone" in clock._inside  # for what rank 0 does
        with clock.timed("alone" if waits else "exchange"), exchange(self, tensor):
            yield

    def timed_alone(self: Ranks, function: Callable[[Callable[[], None]], Any]) -> Any:
        with clock.timed("alone"):
            return alone(self, function)

    Ranks._exchange, Ranks.alone = timed_exchange, timed_alone  # type: ignore[method-assign]


def sample_disk(samples: list[tuple[float, int, int]]) -> None:
    """Notes the bytes that this process has had the disk read and write, where the kernel counts them."""
    samples.append((time.monotonic(), 0, 0))
    while Path("/proc/self/io").exists():
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        samples.append((time.monotonic(), int(counts["read_bytes"]), int(counts["write_bytes"])))
        time.sleep(SAMPLED_S)


def run(arguments: list[str], marks: list[tuple[float, str, int]]) -> dict[str, Any]:
    """Runs one command; what it printed, and when it began and ended."""
    told, code = io.StringIO(), 0
    marks.clear()
    begun = time.monotonic()
    try:
        with contextlib.redirect_stdout(told):
            cli.main(arguments, prog_name="dsquant", standalone_mode=False)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    return {"code": code, "begun": begun, "ended": time.monotonic(), "told": told.getvalue(), "marks": list(marks)}


def serve(ranks: Ranks, result: Path) -> None:
    """Runs commands until the standard input ends."""
    clock, marks, disk = Clock(), list[tuple[float, str, int]](), list[tuple[float, int, int]]()
    watch(clock)

    def note(step: Progress) -> None:
        marks.append((time.monotonic(), step.stage, step.done))

    # a command joins ranks and shows its progress by these two, which it imports when it runs
    ranks_module.joined = lambda: contextlib.nullcontext(ranks)  # type: ignore[assignment, return-value]
    terminal.progress_bar = lambda visible=True: contextlib.nullcontext(note)  # type: ignore[assignment, return-value]
    threading.Thread(target=sample_disk, args=(disk,), daemon=True).start()
    while line := ranks.once(sys.stdin.readline):
        clock.spans.clear()
        del disk[:-1]
        found = run(json.loads(line), marks)
        result.write_text(json.dumps({**found, "spans": clock.spans, "disk": disk}))
        if found["code"]:
            os._exit(found["code"])  # as a rank of a launcher does
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        ranks.barrier()
        if ranks.first:
            sys.stdout.write("done\n")
            sys.stdout.flush()


if __name__ == "__main__":
    with joined() as group:
        if group.first:
            sys.stdout.write("joined\n")
            sys.stdout.flush()
        serve(group, Path(os.environ["RANKS_RESULT"]))
