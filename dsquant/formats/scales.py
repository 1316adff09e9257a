"""The folded scales in a file next to the weights, dsquant.scales: they fold a later release in the same way.

It is a safetensors file: producer (a norm or a linear) -> float32 scales [I] that its output is divided by. The name
has no .safetensors ending, since some engines load every such file of a folder.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from dsquant.files.foreign import find_file
from dsquant.formats.output_shards import Shard, ShardFile, StoredTensor
from dsquant.model.overlays import Fold, fold_of
from dsquant.model.structure import DecoderLayer
from dsquant.source.shards import ShardIndex, read_header
from dsquant.source.weights import Weights

SCALES_FILE = "dsquant.scales"


def store_scales(folder: Path, scales: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Writes producer -> float32 scales [I] into a folder; returns producer -> SHA-256."""
    tensors = tuple(StoredTensor(name, "F32", tuple(kept.shape)) for name, kept in scales.items())
    file = ShardFile(folder, Shard(SCALES_FILE, "", tensors))
    try:
        for name, kept in scales.items():
            file.write_rows(name, 0, kept)
        return file.commit()
    finally:
        file.discard()


def open_scales(folder: Path) -> ShardIndex:
    """Opens the scales of a checkpoint folder, producer -> place; empty where nothing is folded. Raises InputError
    where the file is damaged."""
    path = find_file(folder, SCALES_FILE)
    return ShardIndex(folder, {} if path is None else read_header(path))


def recorded_fold(layer: DecoderLayer, weights: Weights, scales: ShardIndex) -> Fold:
    """Returns the factors of every parameter of a layer from the scales of `open_scales`; `weights` gives shapes."""
    fold = Fold()
    for group in layer.scale_groups:
        if group.producer in scales:
            fold.update(fold_of(weights, group, scales.read(group.producer)))
    return fold
