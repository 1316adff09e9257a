"""Replays of many small kernels on a GPU, whose launches take longer than their work: CUDA graphs."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import torch

Work = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


Graphs = dict[Hashable, _Graph | None]
"""By name and shapes; None for work that was done once, which compiled its kernels."""


@dataclass
class _Recorded:
    """The process's graphs: those that are in use, and those that are kept between blocks."""

    lock: Lock = field(default_factory=Lock)
    graphs: Graphs | None = None
    kept: Graphs | None = None


_recorded = _Recorded()


@contextmanager
def recorded_launches(again: bool = False) -> Iterator[None]:
    """Lets `replayed` record work inside a block that repeats it, such as all experts of a layer.

    Graphs keep memory for their inputs and all that the work makes, until the block ends; in `kept_launches` those of a
    block that comes `again` are kept for the next.
    """
    kept = _recorded.kept if again else None
    graphs = _recorded.graphs = {} if kept is None else kept
    try:
        yield
    finally:
        if _recorded.graphs is graphs:
            _recorded.graphs = None


@contextmanager
def kept_launches() -> Iterator[None]:
    """Keeps what is recorded in blocks that come again, until this one ends."""
    _recorded.kept = {}
    try:
        yield
    finally:
        _recorded.kept = None


def replayed(work: Work, name: Hashable, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Does some work on tensors; on a GPU, in `recorded_launches`, what repeats is replayed with one launch.

    The work depends on nothing but its name and the inputs, which it may overwrite; it never waits for the GPU. Results
    are the same either way; a graph's are copied.
    """
    if not inputs[0].is_cuda:
        return work(*inputs)
    with _recorded.lock:
        graphs, stream = _recorded.graphs, torch.cuda.current_stream(inputs[0].device)
        key = (name, stream, *((part.shape, part.stride(), part.dtype) for part in inputs))
        if graphs is None or key not in graphs:
            if graphs is not None:
                graphs[key] = None
            return work(*inputs)
        found = graphs[key]
        if found is None:
            found = graphs[key] = _record(work, inputs)
        for kept, given in zip(found.inputs, inputs, strict=True):
            kept.copy_(given)
        found.graph.replay()
        return tuple(part.clone() for part in found.outputs)


def _record(work: Work, inputs: tuple[torch.Tensor, ...]) -> _Graph:
    kept, graph = tuple(map(torch.empty_like, inputs)), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads go on with the GPU
        outputs = work(*kept)
    return _Graph(graph, kept, outputs)
