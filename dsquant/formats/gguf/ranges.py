"""Finds values that the types of a GGUF file cannot hold, while the source is hashed: before any weight is
converted."""

from collections.abc import Iterable

import torch

from dsquant.errors import InputError
from dsquant.formats.gguf.files import GgufTensor
from dsquant.formats.gguf.layout import placements
from dsquant.source.checkpoint import FP8, Checkpoint
from dsquant.source.fp8_blocks import SCALE_SUFFIX
from dsquant.source.scan import LARGEST_FP8, Look
from dsquant.source.shards import TensorInfo

# Every other type stores values, or the scales of its blocks, as F16.
UNBOUNDED = ("F32", "BF16")
LARGEST_F16 = 65504.0
ROWS_AT_ONCE = 1024


def range_look(checkpoint: Checkpoint, tensors: Iterable[GgufTensor]) -> Look:
    """Returns a function that is given every stored tensor, and raises InputError where the planned types cannot hold
    it.

    Folding scales in can still make a value too large, which is found when it is stored.
    """
    bounded = {tensor.name: tensor.type_name for tensor in tensors if tensor.type_name not in UNBOUNDED}
    types: dict[str, str] = {}
    for parameter in checkpoint.weights if bounded else ():
        for place in placements(parameter, checkpoint.architecture):
            if place.tensor in bounded:
                types[parameter] = bounded[place.tensor]

    def look(info: TensorInfo, values: torch.Tensor) -> None:
        if info.name in types and info.dtype != FP8:
            check_range(checkpoint, info.name, types[info.name], values)
        parameter = info.name.removesuffix(SCALE_SUFFIX)
        if parameter in types and info.name != parameter and LARGEST_FP8 * float(values.float().max()) > LARGEST_F16:
            # The largest scale may belong to small numbers: only now is the weight itself read.
            rows = checkpoint.weights.shape(parameter)[0]
            for start in range(0, rows, ROWS_AT_ONCE):
                part = checkpoint.weights.rows(parameter, start, min(start + ROWS_AT_ONCE, rows))
                check_range(checkpoint, parameter, types[parameter], part)

    return look


def check_range(checkpoint: Checkpoint, parameter: str, type_name: str, values: torch.Tensor) -> None:
    """Raises InputError where values of a parameter, of any float type but FP8, are out of a type's range."""
    lowest, highest = (float(value) for value in values.aminmax()) if values.numel() else (0.0, 0.0)
    largest = max(-lowest, highest)
    if type_name not in UNBOUNDED and not largest <= LARGEST_F16:
        raise InputError(
            f"{checkpoint.folder}: tensor {parameter!r} has a value of {largest:.3g}; numbers or scales of {type_name} "
            f"go up to {LARGEST_F16:.0f}; convert with --type BF16 or F32"
        )
