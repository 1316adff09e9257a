"""Finds values that the types of a GGUF file cannot hold, before they are stored."""

import torch

from dsquant.errors import InputError
from dsquant.source.checkpoint import Checkpoint

# Every other type stores values, or the scales of its blocks, as F16.
UNBOUNDED = ("F32", "BF16")
LARGEST_F16 = 65504.0


def check_range(checkpoint: Checkpoint, parameter: str, type_name: str, values: torch.Tensor) -> None:
    """Raises InputError where values of a parameter, are out of a type's range."""
    if type_name in UNBOUNDED or not values.numel():
        return
    lowest, highest = torch.stack(values.aminmax()).tolist()  # waits for a GPU, once
    largest = max(-lowest, highest)
    if not largest <= LARGEST_F16:
        raise InputError(
            f"{checkpoint.folder}: tensor {parameter!r} has a value of {largest:.3g}; numbers or scales of {type_name} "
            f"go up to {LARGEST_F16:.0f}; convert with --type BF16 or F32"
        )
