"""Hashes tensors that several ranks write, while they write them.

Every rank tells in a file of its own which bytes it has written, and of each tensor one rank hashes the bytes in their
order as they become complete: it reads them from the page cache, which all ranks of a machine have in common. With
several machines every hash is made when the tensor is whole.
"""

import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from itertools import chain
from pathlib import Path
from threading import Event, Lock, Thread

from dsquant.errors import InputError
from dsquant.files.disk import naming, write_at
from dsquant.files.hashing import FollowedHash
from dsquant.jobs.ranks import Ranks

# A tensor's number, and where the bytes that are written begin and end in the output's file.
RECORD = struct.Struct("<QQQ")
# So often the other ranks' files are read; nothing waits for it, and every time takes Python's lock from others.
POLL_S = 0.1
# Tensors that a rank hashes at the same time.
THREADS = 4


class SharedHashes:
    """The hashes of the tensors of an output; each is made by one rank, and all ranks call the same methods."""

    def __init__(self, ranks: Ranks, work: Path, places: Mapping[str, tuple[FileIO, int, int]]) -> None:
        """Begins to follow what ranks write.

        `work` is the job's work folder; `places` has the same tensors in the same order on every rank: the file, where
        the tensor begins in it, and its size in bytes.
        """
        self._ranks, self._places = ranks, places
        # By size, as the experts' tensors of a layer then follow one another, and ranks share them evenly.
        self._names = sorted(places, key=lambda name: -places[name][2])
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="dsquant-hash")
        self._lock = Lock()
        self._followed: dict[str, FollowedHash] = {}
        self._done: set[str] = set()
        self._error: Exception | None = None
        self._closed, self._end = Event(), 0
        self._told = _files_of_ranks(ranks, work)
        self._watching = Thread(target=self._watch, name="dsquant-follow", daemon=True)
        if self._told:
            self._watching.start()

    def written(self, name: str, start: int, stop: int) -> None:
        """Tells the other ranks that bytes start..stop-1 of the output's file, which belong to this tensor, are
        written."""
        if self._told:
            own = self._told[self._ranks.rank]
            with naming(Path(str(own.name))):
                write_at(own.fileno(), memoryview(RECORD.pack(self._numbers[name], start, stop)), self._end)
            self._end += RECORD.size

    def _watch(self) -> None:
        """Hands what ranks tell of this rank's tensors to their hashes, once two ranks have written to a tensor."""
        reading = [_records(file) for file in self._told]
        parts: dict[int, dict[int, list[tuple[int, int]]]] = {}
        try:
            while not self._closed.wait(POLL_S):
                for rank, records in enumerate(reading):
                    for number, start, stop in next(records):
                        if number % self._ranks.size == self._ranks.rank:
                            parts.setdefault(number, {}).setdefault(rank, []).append((start, stop))
                for number, of_ranks in parts.items():
                    if len(of_ranks) > 1:
                        self._extend(self._names[number], chain(*of_ranks.values()))
                        of_ranks.update((rank, []) for rank in of_ranks)
        except Exception as error:  # raised by `of`
            self._error = error

    def _extend(self, name: str, extents: Iterable[tuple[int, int]]) -> None:
        with self._lock:
            if name in self._done:
                return
            if name not in self._followed:
                file, begin, _ = self._places[name]
                self._followed[name] = FollowedHash(file.fileno(), begin)
            for start, stop in extents:
                self._followed[name].extend(start, stop, self._pool)

    def of(self, names: Sequence[str]) -> dict[str, str]:
        """Returns tensor -> SHA-256, hexadecimal, on every rank, of tensors that the ranks together have written
        completely; hashes what is left of them. Raises what has stopped this rank's threads; on all ranks InputError
        where somebody has cut the file off."""
        parts = self._ranks.gather(self._ranks.together(lambda: self._own(names)))
        found = {name: digest for part in parts for name, digest in part.items()}
        return {name: found[name] for name in names}

    def _own(self, names: Sequence[str]) -> dict[str, str]:
        """The hashes of this rank's tensors."""
        if self._error is not None:
            raise self._error
        made = {}
        for name in names:
            if self._numbers[name] % self._ranks.size == self._ranks.rank:
                file, start, num_bytes = self._places[name]
                self._extend(name, [(start, start + num_bytes)])
        for name in names:
            if self._numbers[name] % self._ranks.size == self._ranks.rank:
                file, _, num_bytes = self._places[name]
                with naming(Path(str(file.name))):
                    count, made[name] = self._followed[name].result() or (0, "")
                if count != num_bytes:
                    raise InputError(f"{file.name}: {name} was cut off while it was written; start over with --restart")
                with self._lock:
                    del self._followed[name]
                    self._done.add(name)
        return made

    def close(self) -> None:
        """Gives up what is not hashed yet, before the tensors' files are closed."""
        self._closed.set()
        if self._told:
            self._watching.join()
        for followed in self._followed.values():
            followed.give_up()
        self._pool.shutdown()
        for file in self._told:
            file.close()


def _files_of_ranks(ranks: Ranks, work: Path) -> list[FileIO]:
    """Opens what each rank writes for the others, empty and without a name; returns none where ranks have nobody to
    follow, or not the same page cache."""
    if ranks.size == 1 or len(set(ranks.gather(_machine()))) > 1:
        return []
    paths = [work / f"written-{rank}" for rank in range(ranks.size)]
    paths[ranks.rank].unlink(missing_ok=True)  # a process of an earlier run may still have that one open
    paths[ranks.rank].touch(exist_ok=False)
    ranks.barrier()
    opened = [path.open("r+b" if rank == ranks.rank else "rb", buffering=0) for rank, path in enumerate(paths)]
    ranks.barrier()
    paths[ranks.rank].unlink()
    return opened


def _machine() -> tuple[str, str]:
    """What tells a machine from others, and from itself before it was started."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text() if boot.is_file() else ""


def _records(file: FileIO) -> Iterator[list[tuple[int, int, int]]]:
    """Yields the records that have been added to a file since the last ones."""
    end = 0
    while True:
        raw = os.pread(file.fileno(), RECORD.size * 2**12, end)
        whole = len(raw) - len(raw) % RECORD.size
        end += whole
        yield list(RECORD.iter_unpack(raw[:whole]))
