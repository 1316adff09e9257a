"""Work shared by threads so that its bytes do not depend on their number.

A library that splits a sum among its threads adds it up in another order for each number of them, and some kernels
compute an element otherwise where a thread's part ends. So while a job runs every tensor operation keeps to one
thread, and threads take whole blocks, whose edges depend on shapes alone (docs/decisions/0020).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch

# A block of fewer multiplications would spend its time on being handed over.
LEAST_WORK = 2**26

Part = TypeVar("Part")
Result = TypeVar("Result")


class _Workers:
    """The threads of this process that jobs share; PyTorch's own number of threads is as global as they are."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.jobs = 0
        self.number = 1
        self.pool: ThreadPoolExecutor | None = None
        self.inside = threading.local()


_workers = _Workers()


@contextmanager
def one_thread_an_operation(device: torch.device | str) -> Iterator[None]:
    """Keeps every tensor operation to one thread; as many threads as PyTorch had take the blocks of `side_by_side`.

    Nothing changes for a job on a GPU, where its bytes are computed.
    """
    if torch.device(device).type != "cpu":
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    with _workers.lock:
        if not _workers.jobs:
            _workers.number = torch.get_num_threads()
            _workers.pool = ThreadPoolExecutor(
                _workers.number, "dsquant-compute", initializer=torch.set_num_threads, initargs=(1,)
            )
        _workers.jobs += 1
    torch.set_num_threads(1)  # OpenMP keeps a number for each thread


def _leave() -> None:
    with _workers.lock:
        _workers.jobs -= 1
        if not _workers.jobs and _workers.pool is not None:
            _workers.pool.shutdown()
            _workers.pool = None
            torch.set_num_threads(_workers.number)


def side_by_side(function: Callable[[Part], Result], parts: Iterable[Part], at_most: int | None = None) -> list[Result]:
    """Calls a function for every part, in a job's threads where there are several; returns results in part order.

    The function writes nothing that another part reads or writes; parts must not depend on the number of threads.
    `at_most` parts in work at a time (None: as many as threads) bound their memory.
    """
    parts, pool = list(parts), _workers.pool
    if pool is None or _workers.number == 1 or len(parts) == 1 or getattr(_workers.inside, "block", False):
        return [function(part) for part in parts]
    with_gradients = torch.is_grad_enabled()  # each thread has its own mode

    def work(part: Part) -> Result:
        _workers.inside.block = True
        with torch.set_grad_enabled(with_gradients):
            return function(part)

    results: list[Result] = []
    running: deque[Future[Result]] = deque()
    try:
        for part in parts:
            if len(running) == at_most:
                results.append(running.popleft().result())
            running.append(pool.submit(work, part))
        results.extend(future.result() for future in running)
    finally:
        for future in running:
            future.cancel()
    return results


def blocks_of(extent: int, work: int, least: int = 256, alignment: int = 64) -> list[slice]:
    """Cuts a dimension into blocks, in order, that are worth a thread's while.

    `work` is the multiplications for each of its places, `least` the fewest places of a block. Edges are multiples of
    `alignment`; kernels go through rows and columns in steps of up to 64.
    """
    number = max(1, extent // max(least, -(-LEAST_WORK // max(1, work))))
    edges = [extent * place // number // alignment * alignment for place in range(number)] + [extent]
    return [slice(start, stop) for start, stop in pairwise(edges)]
