"""The folded scales as a file beside the weights, dsquant.scales: what a later release needs to be folded the same way.

It is a safetensors file: producer (a norm or a linear) -> float32 scales [I] that its output is divided by. The name
has no .safetensors ending, since some engines load every such file of a folder.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from dsquant.files.foreign import find_file
from dsquant.formats.shards import Shard, ShardFile, StoredTensor
from dsquant.model.overlays import Fold, fold_of
from dsquant.model.structure import DecoderLayer
from dsquant.source.shards import ShardIndex, read_header
from dsquant.source.weights import Weights

SCALES_FILE = "dsquant.scales"


def store_scales(folder: Path, scales: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Writes scales.

    Args:
        folder: where the file goes.
        scales: producer -> float32 [I].

    Returns:
        Producer -> SHA-256 of its scales.
    """
    tensors = tuple(StoredTensor(name, "F32", tuple(kept.shape)) for name, kept in scales.items())
    file = ShardFile(folder, Shard(SCALES_FILE, "", tensors))
    try:
        for name, kept in scales.items():
            file.write_rows(name, 0, kept)
        return file.commit()
    finally:
        file.discard()


def open_scales(folder: Path) -> ShardIndex:
    """The scales of an output, read on access.

    Args:
        folder: the checkpoint's folder.

    Returns:
        Producer -> where its scales lie; empty where nothing is folded.

    Raises:
        InputError: where the file is damaged.
    """
    path = find_file(folder, SCALES_FILE)
    return ShardIndex(folder, {} if path is None else read_header(path))


def recorded_fold(layer: DecoderLayer, weights: Weights, scales: ShardIndex) -> Fold:
    """The factors of every parameter of a layer, from the scales that a job has kept.

    Args:
        layer: the layer.
        weights: its weights, for shapes.
        scales: from `open_scales`.

    Returns:
        The fold; nothing in it where nothing was folded.
    """
    fold = Fold()
    for group in layer.scale_groups:
        if group.producer in scales:
            fold.update(fold_of(weights, group, scales.read(group.producer)))
    return fold
