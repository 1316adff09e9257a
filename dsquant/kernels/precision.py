"""The precision of a GPU's float32 matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_matmuls(device: torch.device) -> Iterator[None]:
    """Lets matrix products on a GPU round their inputs to TF32 (11 bits) inside a block: 5 to 8 times as fast.

    Good for the original's own forward and for sums of squared errors, not for proofs that two results are the same.
    Nothing changes on a CPU.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
