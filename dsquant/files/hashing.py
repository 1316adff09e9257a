"""Hashes of tensors and of whole files, made while they are being written: nothing is read again at the end."""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from dsquant.files.disk import joined

BYTES_AT_ONCE = 2**24
# Files whose hashes are made at the same time: a file's own bytes are hashed one after the other, at 1 to 2 GB/s.
THREADS = 4


class OrderedHash:
    """The SHA-256 of bytes that come in parts, as far as they come in their order; and their number, in any order."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._hashed = 0
        self._digest = hashlib.sha256()

    def add(self, start: int, raw: memoryview) -> None:
        """Takes a part that begins at byte `start`; each byte comes once."""
        if start == self._hashed:
            self._digest.update(raw)
            self._hashed += len(raw)
        self.num_bytes += len(raw)

    def of(self, num_bytes: int) -> str:
        """Returns the hash, hexadecimal, where that many bytes have come, all in order; else an empty text."""
        return self._digest.hexdigest() if self._hashed == num_bytes else ""


class FileHashes:
    """Hashes files in the background while they grow: each from its start, as far as it is written without a gap.

    What has just been written is read from the system's memory, not from the disk.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._files: dict[Path, FollowedHash] = {}

    def written(self, path: Path, name: str, start: int, stop: int) -> None:
        """Takes note that bytes start..stop-1 of a file are written; it is at `path` now and will be called `name` in
        the same folder."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="dsquant-hash")
        final = path.with_name(name)
        if final not in self._files:
            self._files[final] = FollowedHash(os.open(path, os.O_RDONLY))  # which outlives a renaming
        self._files[final].extend(start, stop, self._pool)

    def whole(self) -> dict[Path, dict[str, Any]]:
        """Waits until all that is written is hashed; returns final path -> bytes and sha256 of whole files."""
        whole = {}
        for path, file in self._files.items():
            found = file.result()
            if found is not None and found[0] == os.fstat(file.descriptor).st_size:
                whole[path] = {"bytes": found[0], "sha256": found[1]}
        return whole

    def close(self) -> None:
        """Gives up what is not hashed yet."""
        for file in self._files.values():
            file.give_up()
        if self._pool is not None:
            self._pool.shutdown()
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()


class FollowedHash:
    """The SHA-256 of a file from one of its bytes on, made while it grows, by one thread at a time."""

    def __init__(self, descriptor: int, start: int = 0) -> None:
        self.descriptor = descriptor
        self._start, self._end = start, start
        self._lock = Lock()
        self._written: list[tuple[int, int]] = []
        self._digest, self._given_up = hashlib.sha256(), False
        self._running: Future[None] | None = None

    def extend(self, start: int, stop: int, pool: ThreadPoolExecutor) -> None:
        """Takes note that bytes start..stop-1 of the file are written; a thread of the pool hashes those without a gap
        before them."""
        with self._lock:
            self._written = joined([*self._written, (start, stop)])
            if self._running is None and self._without_gap > self._end:
                self._running = pool.submit(self._follow)

    @property
    def _without_gap(self) -> int:
        """The end of the bytes that are written without a gap."""
        start, stop = self._written[0]
        return stop if start == self._start else self._start

    def _follow(self) -> None:
        while True:
            with self._lock:
                count = min(BYTES_AT_ONCE, self._without_gap - self._end)
                if not count or self._given_up:
                    self._running = None
                    return
            block = os.pread(self.descriptor, count, self._end)
            if not block:  # somebody has cut it off
                self._given_up = True
            self._digest.update(block)
            self._end += len(block)

    def result(self) -> tuple[int, str] | None:
        """Waits until all that is written without a gap is hashed; returns how many bytes these are, and their hash,
        hexadecimal, or None where they could not be read. Raises the thread's error."""
        while (running := self._running) is not None:
            running.result()
        return None if self._given_up else (self._end - self._start, self._digest.hexdigest())

    def give_up(self) -> None:
        """Hashes no more than the bytes that have just been read."""
        self._given_up = True
