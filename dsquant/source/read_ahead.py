"""Reads tensors in the background, so that the disk works while a layer is computed."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from dsquant.source.shards import ShardIndex

# Each hashes what it reads the first time, at some 0.6 GB/s; a disk gives two to three of these.
THREADS = 6


class ReadAhead:
    """Tensors that were requested before they are needed; each is handed out once."""

    def __init__(
        self, read: Callable[[str], torch.Tensor], num_bytes: Callable[[str], int], threads: int = THREADS
    ) -> None:
        """Creates no thread before the first request; `read` is called in several of them, `num_bytes` tells how large
        what it returns is."""
        self._read, self._num_bytes, self._threads = read, num_bytes, threads
        self._pool: ThreadPoolExecutor | None = None
        self._begun: dict[str, Future[torch.Tensor]] = {}

    def begin(self, names: Sequence[str]) -> int:
        """Starts to read tensors that are not being read yet; returns their bytes."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "dsquant-read", torch.set_num_threads, (1,))
        new = [name for name in names if name not in self._begun]
        for name in new:
            self._begun[name] = self._pool.submit(self._read, name)
        return sum(map(self._num_bytes, new))

    def take(self, name: str) -> torch.Tensor:
        """Returns a tensor, in host memory; reads it now where that has not started."""
        begun = self._begun.pop(name, None)
        return begun.result() if begun is not None else self._read(name)


def stored_ahead(index: ShardIndex, pinned: bool) -> ReadAhead:
    """Returns what reads tensors as they are stored; `pinned` into page-locked memory, from where a GPU copies while it
    computes."""
    return ReadAhead(partial(index.read, pinned=pinned), lambda name: index[name].num_bytes)
