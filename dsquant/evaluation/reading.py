"""Keeps the disk, the copies to a GPU and its kernels busy at once while models pass through the network."""

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from dsquant.model.gated import GatedWeights
from dsquant.model.skeleton import Skeleton
from dsquant.model.structure import Mlp
from dsquant.source.weights import Weights

# Experts whose kernels wait on a GPU at a time: their weights are in its memory.
EXPERTS_QUEUED = 2


class Reading:
    """Has weights read in the order in which a rank uses them, a bounded number of bytes ahead, across layers."""

    def __init__(self, models: Sequence[Weights], units: Iterator[Sequence[str]], room_bytes: int) -> None:
        """`units` are the names that are used one after the other: a layer's dense part, an expert.

        Starts to read the first of them, and more while they have room in `room_bytes` of host memory.
        """
        self._models, self._units, self._room_bytes = models, units, room_bytes
        self._begun: deque[int] = deque()
        self._begin()

    def used(self) -> None:
        """Takes note that the unit in front has been read by all models; begins what now has room."""
        if self._begun:
            self._begun.popleft()
        self._begin()

    def _begin(self) -> None:
        while not self._begun or sum(self._begun) < self._room_bytes:
            names = next(self._units, None)
            if names is None:
                return
            self._begun.append(sum(model.prefetch(names) for model in self._models))


def units_of(skeleton: Skeleton, rank: int, size: int) -> Iterator[Sequence[str]]:
    """Yields the parameters that a rank of `size` reads: of each layer the dense part's, then those of its experts."""
    for layer in skeleton.layers[: skeleton.num_layers]:
        module = skeleton.module(layer.prefix)
        inside = [*dict(module.named_parameters()), *dict(module.named_buffers())]
        yield [f"{layer.prefix}.{part}" for part in inside]
        for mlp in layer.experts[rank::size]:
            yield [f"{linear}.weight" for linear in mlp.linears]


class SideStream:
    """Reads experts beside the kernels that run: what decoding waits for is not the experts before."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._queued: deque[torch.cuda.Event] = deque()

    def read(self, weights: Weights, mlp: Mlp) -> GatedWeights:
        """Returns an expert's weights; kernels that are started from here on wait for them."""
        if self._stream is None:
            return GatedWeights.read(weights, mlp)
        with torch.cuda.stream(self._stream):
            found = GatedWeights.read(weights, mlp)
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for part in found.parts:
            part.record_stream(current)  # its memory is taken again once these kernels have ended
        return found

    def queued(self) -> None:
        """Takes note that an expert's kernels have been started; waits where more than `EXPERTS_QUEUED` have not
        ended."""
        if self._stream is None:
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._stream.device))
        self._queued.append(event)
        if len(self._queued) > EXPERTS_QUEUED:
            self._queued.popleft().synchronize()
