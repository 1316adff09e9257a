"""Replays of many small kernels on a GPU, whose launches take longer than their work: CUDA graphs."""

import math
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

    @property
    def num_bytes(self) -> int:
        return _num_bytes(self.inputs)


def _num_bytes(inputs: tuple[torch.Tensor, ...]) -> int:
    return graph_bytes(*(part.nbytes for part in inputs))


Graphs = dict[Hashable, _Graph | None]
"""By name and shapes; None for work that was done once, which compiled its kernels."""


@dataclass
class _Recorded:
    """The process's graphs: those that are in use, and those that are kept between blocks."""

    lock: Lock = field(default_factory=Lock)
    graphs: Graphs | None = None
    kept: Graphs | None = None
    most_bytes: float = math.inf


_recorded = _Recorded()


@contextmanager
def recorded_launches(again: bool = False) -> Iterator[None]:
    """Lets `replayed` record work inside a block that repeats it, such as all experts of a layer.

    Graphs keep memory for their inputs and all that the work makes, until the block ends; where `launches_within` keeps
    them, those of a block that comes `again` are there for the next.
    """
    kept = _recorded.kept if again else None
    graphs = _recorded.graphs = {} if kept is None else kept
    try:
        yield
    finally:
        if _recorded.graphs is graphs:
            _recorded.graphs = None


@contextmanager
def launches_within(most_bytes: float, keeps: bool) -> Iterator[None]:
    """Bounds the memory of what is recorded, as `graph_bytes` counts it: beyond that work is done launch by launch.

    `keeps` keeps what is recorded in blocks that come again, until this one ends.
    """
    _recorded.most_bytes, _recorded.kept = most_bytes, {} if keeps else None
    try:
        yield
    finally:
        _recorded.most_bytes, _recorded.kept = math.inf, None


def graph_bytes(*inputs: int) -> int:
    """Counts a graph's memory by that of its inputs: their copies, and the first once more for all that is made."""
    return inputs[0] + sum(inputs)


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
            taken = sum(graph.num_bytes for graph in graphs.values() if graph is not None)
            if taken + _num_bytes(inputs) > _recorded.most_bytes:
                return work(*inputs)
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
