"""Reads each tensor of a new release once: hashes it, and keeps it while it is needed."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import torch

from dsquant.errors import InputError
from dsquant.formats.checkpoints import stored_weights
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.scan import all_finite
from dsquant.source.shards import ShardIndex


class HeldTensors(ShardIndex):
    """An index that reads a tensor from disk when it is held, and from memory until it is released."""

    def __init__(self, index: ShardIndex) -> None:
        super().__init__(index.folder, dict(index))
        self._held: dict[str, torch.Tensor] = {}

    def hold(self, names: Iterable[str]) -> dict[str, str]:
        """Reads tensors and keeps them in place of those held before; returns tensor -> SHA-256 of its bytes. Raises
        InputError where one holds NaN or infinity."""
        self._held = {}
        hashes = {}
        for name in names:
            stored = self.read(name)
            if not all_finite(stored):
                info = self[name]
                raise InputError(f"{info.path}: tensor {info.label} holds NaN or infinity; download the file again")
            hashes[name] = hashlib.sha256(memoryview(stored.view(-1).view(torch.uint8).numpy().data)).hexdigest()
            self._held[name] = stored
        return hashes

    def read(self, name: str, start_row: int = 0, stop_row: int | None = None, pinned: bool = False) -> torch.Tensor:
        """Reads a tensor or some of its rows, from memory where it is held."""
        held = self._held.get(name)
        if held is None:
            return super().read(name, start_row, stop_row, pinned)
        return held[start_row:stop_row] if held.dim() else held


def held_once(checkpoint: Checkpoint, order: Iterable[str]) -> tuple[Checkpoint, HeldTensors]:
    """Returns a checkpoint whose weights are read through `HeldTensors`, and its index.

    `order` is the tensors' order in the earlier release, which the output's files follow; this one may have been saved
    in another.
    """
    names = dict.fromkeys([*(name for name in order if name in checkpoint.index), *checkpoint.index])
    index = HeldTensors(ShardIndex(checkpoint.folder, {name: checkpoint.index[name] for name in names}))
    return replace(checkpoint, index=index, weights=stored_weights(index, checkpoint.config)), index
