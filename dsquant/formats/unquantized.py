"""Parameters that are not quantized, as the tensors that store them: floats, the source's own FP8 blocks, or its own
integers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from dsquant.source.checkpoint import Checkpoint, stored_parts
from dsquant.source.fp8_blocks import SCALE_SUFFIX
from dsquant.source.shards import DTYPES

if TYPE_CHECKING:
    from dsquant.formats.safetensors_target import SafetensorsTarget

# Tables are copied in parts of this many rows: a multiple of the FP8 block, 112 MiB for R1's embedding.
ROWS_AT_ONCE = 4096


def changed_tensors(
    target: "SafetensorsTarget", checkpoint: Checkpoint, parameter: str, values: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns the tensors of a parameter with folded scales, float32: name -> tensor as it is stored."""
    stored = target.fp8_tensors(parameter, checkpoint)
    if stored is None:
        return {parameter: values.to(DTYPES[target.dtypes[parameter]])}
    scales = checkpoint.index.read(parameter + SCALE_SUFFIX).to(values.device)
    parts = target.fp8[parameter.removesuffix(".weight")].requantized(values, scales)
    return {tensor.name: part for tensor, part in zip(stored, parts, strict=True)}


def unchanged_rows(
    target: "SafetensorsTarget", checkpoint: Checkpoint, parameter: str
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yields the tensors of a parameter as the source has it, in parts of bounded size: name, first row, rows.

    Integers are copied as they are stored; so are FP8 blocks, but for scales that are not float32.
    """
    if parameter.removesuffix(".weight") in target.released:
        for name in stored_parts(checkpoint.index, parameter):
            yield name, 0, checkpoint.index.read(name)
        return
    stored, weights = target.fp8_tensors(parameter, checkpoint), checkpoint.weights
    if stored is not None:
        yield stored[1].name, 0, checkpoint.index.read(parameter + SCALE_SUFFIX).float()
    num_rows = weights.shape(parameter)[0]
    for start in range(0, num_rows, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, num_rows)
        if stored is not None:
            yield stored[0].name, start, checkpoint.index.read(parameter, start, stop)
        else:
            yield parameter, start, weights.rows(parameter, start, stop).to(DTYPES[target.dtypes[parameter]])
