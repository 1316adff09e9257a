"""Several ranks - processes, each with a GPU of its own, on one machine or on several - that do one job together.

    accelerate launch --num_processes 8 -m dsquant.cli awq MODEL --output DIR
    torchrun --nproc-per-node 8 -m dsquant.cli awq MODEL --output DIR
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m dsquant.cli awq ...

Every rank runs the dense part of a layer on its share of the calibration samples and quantizes and writes its share of
the experts. The output folder lies on a file system that all ranks share and see alike: one machine's disk, Lustre,
GPFS, CephFS; this is checked at the start. The model may lie anywhere, and be a copy on each machine.

The bytes written do not depend on the number of ranks (docs/decisions/0013), given the same kind of processor and the
same OMP_NUM_THREADS everywhere; torchrun sets it to 1 where it is not set.

Rank 0 alone holds the folder's lock and writes the journal. A unit counts once all its parts are on disk, so a lost
rank costs the unit at work: every other rank ends with exit code 75 (at once where a process has died, after
`SILENCE_S` where a machine has fallen silent), and `--resume` continues on any number of ranks.

`dsquant eval` shares layers in the same way, with the numbers of one rank, and `dsquant verify` parts of files and
tensors.

Memory budgets are for one rank. Not covered: more than `CHUNKS` ranks in a layer's dense part; attention's own
search, the evaluation at the end of a job and generated code, which rank 0 does alone.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from dsquant.errors import DsquantError, InputError, Interrupted
from dsquant.jobs.launcher import launched
from dsquant.packages import version

# Samples are summed in this many chunks for any number of ranks, and the chunks' sums in their order.
CHUNKS = 16
# A rank that says nothing for so long is lost; the search of one layer's attention, of one expert, or of a rank's share
# of the experts that a choice of widths tries takes less.
SILENCE_S = 30 * 60
# While one rank works alone it tells the others this often that it is alive.
BEAT_S = 20.0
TOKEN_FILE = "ranks"

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among all that do the job, which all call the same methods in the same order."""

    rank: int = 0
    size: int = 1
    control: Any = None
    """The gloo group for everything but tensors on a GPU: it notices a dead process at once."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which holds the lock and writes the journal."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(found, value, group=self.control)
        return found

    def spread(self, function: Callable[[Item], Value], items: Sequence[Item]) -> list[Value]:
        """The function's value for every item, in their order; each is computed by one rank."""
        return self.in_turns([function(item) for item in items[self.rank :: self.size]], len(items))

    def in_turns(self, own: Sequence[Value], count: int) -> list[Value]:
        """All of `count` values, in order, of which the ranks have made one each in turn."""
        parts = self.gather(own)
        return [parts[number % self.size][number // self.size] for number in range(count)]

    def together(self, function: Callable[[], Value]) -> Value:
        """Every rank does it, or none: where one fails, all raise the first rank's error."""
        if self.size == 1:
            return function()
        value, error = None, None
        try:
            value = function()
        except DsquantError as found:
            error = found
        errors = [found for found in self.gather(error) if found is not None]
        if errors:
            raise errors[0]
        return cast(Value, value)

    def once(self, function: Callable[[], Value]) -> Value:
        """Rank 0 does it; every rank gets what comes of it, errors as well."""
        return self.alone(lambda beat: function())

    def alone(self, function: Callable[[Callable[[], None]], Value]) -> Value:
        """Does what `once` does, for longer than `SILENCE_S`: the function calls its argument now and then."""
        if self.size == 1:
            return function(lambda: None)
        if not self.first:
            done, value, error = False, None, None
            while not done:
                done, value, error = self._from_first(None)
            if error is not None:
                raise error
            return cast(Value, value)
        last = time.monotonic()

        def beat() -> None:
            nonlocal last
            if time.monotonic() - last > BEAT_S:
                last = time.monotonic()
                self._from_first((False, None, None))

        try:
            value = function(beat)
        except DsquantError as error:
            self._from_first((True, None, error))
            raise
        self._from_first((True, value, None))
        return value

    def after_first(self, function: Callable[[], Value]) -> Value:
        """Rank 0 does it, then all others do."""
        if self.first:
            value = function()
        self.barrier()
        return value if self.first else function()

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        self.gather(None)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Overwrites a tensor with that of another rank."""
        if self.size > 1:
            with self._exchange(tensor):
                dist.broadcast(_raw(tensor), source)

    def hand_to_first(self, tensor: torch.Tensor, source: int) -> None:
        """Overwrites rank 0's tensor with that of another rank."""
        if source == 0:
            return
        with self._exchange():
            if self.rank == source:
                dist.send(_raw(tensor), 0)
            elif self.first:
                dist.recv(_raw(tensor), source)

    def deliver(self, rows_RH: torch.Tensor, to: Sequence[int], come: Sequence[int]) -> torch.Tensor:
        """Sends float32 rows [R, H], `to[r]` of them to rank r in order of ranks, and returns those that come from the
        ranks, float32 [sum of come, H], in the same order."""
        found_RH = rows_RH.new_empty(sum(come), rows_RH.shape[1])
        with self._exchange(rows_RH):
            dist.all_to_all_single(found_RH, rows_RH.contiguous(), list(come), list(to))
        return found_RH

    def check_alike(self, told: Mapping[str, Any], error: type[DsquantError], then: str) -> None:
        """Raises `error` on all ranks where one differs from rank 0 in what it was told or has read (name for messages
        -> value), naming what differs, the rank and its machine; `then` says what to do."""
        if self.size == 1:
            return
        found = self.gather((dict(told), socket.gethostname()))
        for rank, (its, host) in enumerate(found):
            for name, value in its.items():
                if value != found[0][0].get(name):
                    shown = f" ({value!r:.60}, rank 0 has {found[0][0].get(name)!r:.60})" if _is_short(value) else ""
                    raise error(f"{name} is not the same on rank {rank} ({host}) as on rank 0{shown}; {then}")

    def check_shared(self, folder: Path) -> None:
        """Raises InputError, naming the rank and its machine, where a rank does not see the work folder that rank 0 has
        made, or runs another version of dsquant."""
        path = folder / TOKEN_FILE
        token = self.once(lambda: _new_token(path))
        seen = path.is_file() and path.read_text() == token
        found = self.gather((seen, version("dsquant"), socket.gethostname()))
        for rank, (sees, its_version, host) in enumerate(found):
            if its_version != found[0][1]:
                raise InputError(
                    f"rank {rank} on {host} has dsquant {its_version}, rank 0 {found[0][1]}; install one everywhere"
                )
            if not sees:
                raise InputError(
                    f"{folder.parent}: rank {rank} on {host} does not see this folder as rank 0 does; name an output "
                    "folder on a file system that all ranks share"
                )

    def _from_first(self, message: Any) -> Any:
        box = [message]
        with self._exchange():
            dist.broadcast_object_list(box, 0, group=self.control)
        return box[0]

    @contextmanager
    def _exchange(self, tensor: torch.Tensor | None = None) -> Iterator[None]:
        """Turns a lost rank into a stop that can be resumed."""
        try:
            if tensor is not None and tensor.is_cuda:  # NCCL would wait for a dead process until its timeout
                dist.barrier(self.control)
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
            raise Interrupted(
                f"of {self.size} ranks another is lost ({reason[:120]}); finished units are kept: "
                "continue with --resume, on any number of ranks"
            ) from error


ALONE = Ranks()


@dataclass(frozen=True)
class Shares:
    """How samples are divided: batches into chunks, the same for any number of ranks, and chunks among ranks."""

    num_samples: int
    batch_samples: int
    size: int = 1
    """How many ranks."""

    def chunks(self, rank: int) -> list[tuple[int, int]]:
        """A rank's chunks that are not empty, each its first sample and the one after its last."""
        begin, end = (-(-edge * CHUNKS // self.size) for edge in (rank, rank + 1))
        edges = [self._edge(chunk) for chunk in range(begin, end + 1)]
        return [(start, stop) for start, stop in pairwise(edges) if start < stop]

    def samples(self, rank: int) -> tuple[int, int]:
        """A rank's samples: the first, and the one after the last."""
        begin, end = (-(-edge * CHUNKS // self.size) for edge in (rank, rank + 1))
        return self._edge(begin), self._edge(end)

    def _edge(self, chunk: int) -> int:
        num_batches = -(-self.num_samples // self.batch_samples)
        return min(self.num_samples, chunk * num_batches // CHUNKS * self.batch_samples)


def dealt(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Returns rank -> the places of its items, the largest first: one after the other goes to the rank with least."""
    taken, places = [0] * num_ranks, [list[int]() for _ in range(num_ranks)]
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        rank = taken.index(min(taken))
        places[rank].append(place)
        taken[rank] += sizes[place]
    return places


@contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the ranks that accelerate's launcher or torchrun has started, and yields this one; without a launcher it is
    alone. Raises UsageError where the launcher's variables make no sense, Interrupted where ranks are missing."""
    here = launched()
    if here.size == 1:
        yield ALONE
        return
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a timeout is then an error here, not the process's end
    try:
        control = _answering_signals(_join)
    except (RuntimeError, ValueError) as error:
        raise Interrupted(
            f"the {here.size} ranks did not come together at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"({str(error).splitlines()[0][:200]}); nothing has begun here: start all of them again"
        ) from error
    yield Ranks(dist.get_rank(), dist.get_world_size(), control)
    dist.destroy_process_group()  # after an error the end of the process does it, which waits for nobody


def _join() -> Any:
    silence = timedelta(seconds=SILENCE_S)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=silence)
    return dist.new_group(backend="gloo", timeout=silence)


def _answering_signals(function: Callable[[], Value]) -> Value:
    """Does in another thread what waits without letting Python handle signals."""
    found: Future[Value] = Future()

    def run() -> None:
        try:
            found.set_result(function())
        except BaseException as error:
            found.set_exception(error)

    Thread(target=run, daemon=True).start()
    while not found.done():
        wait([found], timeout=0.2)
    return found.result()


def _is_short(value: Any) -> bool:
    """Whether a value says something to people, which a hash does not."""
    return not (isinstance(value, str) and len(value) == 64)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes: NCCL does not know every type."""
    return tensor.view(-1).view(torch.uint8)


def _new_token(path: Path) -> str:
    token = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
    path.write_text(token)
    return token
