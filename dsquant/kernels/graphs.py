"""Replays of many small kernels on a GPU, whose launches take longer than their work: CUDA graphs."""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from threading import Lock

import torch

Work = Callable[..., tuple[torch.Tensor, ...]]
# Work is recorded when it was asked for so often among the last few times: a layer's experts, not its attention.
OFTEN, AMONG = 3, 8
# Graphs that are kept: gate's and up's, and down's.
KEPT = 2


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


@dataclass
class _Recorded:
    """The process's graphs, the last used at the end."""

    lock: Lock = field(default_factory=Lock)
    asked: deque[Hashable] = field(default_factory=lambda: deque(maxlen=AMONG))
    graphs: OrderedDict[Hashable, _Graph] = field(default_factory=OrderedDict)


_recorded = _Recorded()


def replayed(work: Work, name: Hashable, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Does some work on tensors; on a GPU, what is done often is recorded once and replayed with one launch.

    The work depends on nothing but its name and the inputs, which it may overwrite; it never waits for the GPU. Results
    are the same either way. A graph keeps memory for its inputs and for all that the work makes; outputs are copied.
    """
    if not inputs[0].is_cuda:
        return work(*inputs)
    stream = torch.cuda.current_stream(inputs[0].device)
    key = (name, stream, *((part.shape, part.stride(), part.dtype) for part in inputs))
    with _recorded.lock:
        found = _recorded.graphs.get(key)
        if found is None:
            often = _recorded.asked.count(key) + 1 >= OFTEN
            _recorded.asked.append(key)
            if not often:
                return work(*inputs)
            while len(_recorded.graphs) >= KEPT:
                _recorded.graphs.popitem(last=False)
            found = _recorded.graphs[key] = _record(work, inputs)
        _recorded.graphs.move_to_end(key)
        for kept, given in zip(found.inputs, inputs, strict=True):
            kept.copy_(given)
        found.graph.replay()
        return tuple(part.clone() for part in found.outputs)


def _record(work: Work, inputs: tuple[torch.Tensor, ...]) -> _Graph:
    kept, graph = tuple(torch.empty_like(part) for part in inputs), torch.cuda.CUDAGraph()
    # Other threads go on with the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = work(*kept)
    return _Graph(graph, kept, outputs)
