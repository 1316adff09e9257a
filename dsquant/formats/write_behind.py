"""Hands tensors to several threads at once, so that copying, hashing and the disk do not hold up one another, or the
GPU."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

# What waits to be written keeps its memory until then: three experts of R1 at 4 bits.
MOST_WAITING_BYTES = 64 * 2**20

Sink = Callable[..., None]


class WriteBehind:
    """Threads that each do their work in order; the first error is raised by the next call.

    One brings values to host memory; each place among the sinks of a call has a thread of its own.
    """

    def __init__(self) -> None:
        self._copying = ThreadPoolExecutor(1, thread_name_prefix="dsquant-copy")
        self._sinks: list[ThreadPoolExecutor] = []
        self._waiting: list[tuple[list[Future[None]], int]] = []
        self._stream: torch.cuda.Stream | None = None

    def write(self, tensors: tuple[torch.Tensor, ...], *sinks: Sink) -> None:
        """Hands the values of tensors, which nobody changes any more, to every sink, in host memory."""
        events = [torch.cuda.Event() for _ in range(any(tensor.is_cuda for tensor in tensors))]
        for ready in events:
            ready.record()
        while len(self._sinks) < len(sinks):
            # PyTorch's own threads, of each of these, would only wait for one another
            name = f"dsquant-write-{len(self._sinks)}"
            self._sinks.append(ThreadPoolExecutor(1, name, torch.set_num_threads, (1,)))
        on_host = self._copying.submit(self._on_host, tensors, *events)
        work = [pool.submit(_give, on_host, sink) for pool, sink in zip(self._sinks, sinks, strict=False)]
        self._waiting.append((work, sum(tensor.nbytes for tensor in tensors)))
        while len(self._waiting) > 1 and sum(size for _, size in self._waiting) > MOST_WAITING_BYTES:
            self._finish_first()

    def _on_host(self, tensors: tuple[torch.Tensor, ...], *ready: torch.cuda.Event) -> tuple[torch.Tensor, ...]:
        if not ready:
            return tensors
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        with torch.cuda.stream(self._stream):  # beside the computation, not behind it
            self._stream.wait_event(ready[0])
            copies = tuple(_copy(tensor) for tensor in tensors)
            self._stream.synchronize()
        return copies

    def _finish_first(self) -> None:
        for future in self._waiting.pop(0)[0]:
            future.result()

    def wait(self) -> None:
        while self._waiting:
            self._finish_first()

    def drop(self) -> None:
        """Gives up what is not written yet; returns when nothing is being written any more."""
        futures = [future for work, _ in self._waiting for future in work]
        for future in futures:
            future.cancel()
        wait([future for future in futures if not future.cancelled()])
        self._waiting.clear()

    def close(self) -> None:
        self.drop()
        for pool in (self._copying, *self._sinks):
            pool.shutdown()


def _give(on_host: "Future[tuple[torch.Tensor, ...]]", sink: Sink) -> None:
    sink(*on_host.result())


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Begins to copy a tensor to page-locked memory; one that is there stays."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
