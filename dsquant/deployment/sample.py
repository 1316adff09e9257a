"""Stands for a model by one layer of each kind: layers with the same tensors become files of the same sizes, so that 5
of R1's 62 are planned in the place of all."""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dsquant.formats.checkpoints import stored_weights
from dsquant.model.skeleton import Skeleton
from dsquant.model.structure import layer_number
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.shards import ShardIndex, TensorInfo


@dataclass(frozen=True)
class Sample:
    """A model with the first layer of each kind alone."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    layers: Mapping[str, int]
    """Layer -> how many it stands for, itself among them."""

    def of_unit(self, unit: str) -> int:
        """Returns how many units of the model one of the sample's stands for."""
        return self.layers.get(unit, 1)

    def of_tensor(self, name: str) -> int:
        """Returns the same for a tensor."""
        return self.of_unit(f"model.layers.{layer_number(name)}")


def sample_of(checkpoint: Checkpoint, skeleton: Skeleton) -> Sample:
    """Picks the layers. Those of one kind have tensors of the same names, types and shapes, and numbers of as many
    digits: the headers of their files have one size."""
    tensors: dict[int | None, dict[str, TensorInfo]] = {None: {}}
    for name, info in checkpoint.index.items():
        tensors.setdefault(layer_number(name), {})[name] = info
    first: dict[tuple[object, ...], int] = {}
    kind_of = {}
    for layer in skeleton.layers:
        number, inside = layer.index, len(f"{layer.prefix}.")
        parts = tuple((name[inside:], info.dtype, info.shape) for name, info in tensors.get(number, {}).items())
        kind = (number < skeleton.num_layers, len(str(number)), parts)
        kind_of[number] = first.setdefault(kind, number)
    counts = Counter(kind_of.values())
    kept = {name: info for number in (None, *counts) for name, info in tensors.get(number, {}).items()}
    index = ShardIndex(checkpoint.folder, kept)
    few = copy.copy(skeleton)
    few.layers = tuple(layer for layer in skeleton.layers if layer.index in counts)
    few.num_layers = sum(number < skeleton.num_layers for number in counts)
    return Sample(
        replace(checkpoint, index=index, weights=stored_weights(index, checkpoint.config)),
        few,
        {layer.prefix: counts[layer.index] for layer in few.layers},
    )
