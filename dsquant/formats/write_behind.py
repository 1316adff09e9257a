"""Writes in the background, so that hashing and the disk do not hold up the GPU."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

# What waits to be written keeps its GPU memory until then: three experts of R1 at 4 bits.
MOST_WAITING_BYTES = 64 * 2**20


class WriteBehind:
    """One thread that does its work in order; the first error is raised by the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dsquant-write")
        self._waiting: list[tuple[Future[None], int]] = []
        self._stream: torch.cuda.Stream | None = None

    def write(self, tensor: torch.Tensor, sink: Callable[[torch.Tensor], None]) -> None:
        """Hands a tensor's values, which nobody changes any more, to `sink` in the thread, in host memory."""
        ready = torch.cuda.Event() if tensor.is_cuda else None
        if ready is not None:
            ready.record()
        self._waiting.append((self._pool.submit(self._write, tensor, ready, sink), tensor.nbytes))
        while len(self._waiting) > 1 and sum(size for _, size in self._waiting) > MOST_WAITING_BYTES:
            self._waiting.pop(0)[0].result()

    def _write(
        self, tensor: torch.Tensor, ready: torch.cuda.Event | None, sink: Callable[[torch.Tensor], None]
    ) -> None:
        sink(tensor if ready is None else self._on_host(tensor, ready))

    def _on_host(self, tensor: torch.Tensor, ready: torch.cuda.Event) -> torch.Tensor:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        with torch.cuda.stream(self._stream):  # beside the computation, not behind it
            self._stream.wait_event(ready)
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            self._stream.synchronize()
        return host

    def wait(self) -> None:
        while self._waiting:
            self._waiting.pop(0)[0].result()

    def drop(self) -> None:
        """Gives up what is not written yet; returns when nothing is being written any more."""
        for waiting, _ in self._waiting:
            waiting.cancel()
        wait([waiting for waiting, _ in self._waiting if not waiting.cancelled()])
        self._waiting.clear()

    def close(self) -> None:
        self.drop()
        self._pool.shutdown()
