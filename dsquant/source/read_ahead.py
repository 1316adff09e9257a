"""Reads tensors in the background, so that the disk works while a layer is computed."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from dsquant.source.shards import ShardIndex

# Each hashes what it reads the first time, at some 0.6 GB/s; a disk gives two to three of these.
THREADS = 6


class ReadAhead:
    """Tensors that were requested before they are needed; each is handed out once."""

    def __init__(self, index: ShardIndex, pinned: bool) -> None:
        """Creates no thread before the first request.

        `pinned` reads into page-locked memory, from where a GPU copies while it computes.
        """
        self._index = index
        self._pinned = pinned
        self._pool: ThreadPoolExecutor | None = None
        self._begun: dict[str, Future[torch.Tensor]] = {}

    def begin(self, names: Sequence[str]) -> int:
        """Starts to read tensors that are not being read yet; returns their bytes."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, "dsquant-read", torch.set_num_threads, (1,))
        new = [name for name in names if name not in self._begun]
        for name in new:
            self._begun[name] = self._pool.submit(self._index.read, name, pinned=self._pinned)
        return sum(self._index[name].num_bytes for name in new)

    def take(self, name: str) -> torch.Tensor:
        """Returns a tensor as it is stored, in host memory; reads it now where that has not started."""
        begun = self._begun.pop(name, None)
        return begun.result() if begun is not None else self._index.read(name, pinned=self._pinned)
