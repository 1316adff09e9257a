"""What a running job tells about itself."""

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["scan", "quantize", "evaluate", "hash", "verify"]


@dataclass(frozen=True)
class Progress:
    """One step of a running job."""

    stage: Stage
    done: int
    total: int
    what: str
    """The tensor or module whose work begins."""
    bytes_read: int = 0
    bytes_written: int = 0
    tokens: int = 0
    """Calibration tokens passed through finished layers."""


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Tells nobody."""


def resident_bytes() -> int:
    """Resident memory of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_gpu_bytes() -> int:
    """The most GPU memory that PyTorch has held in this process; 0 where it has used no GPU."""
    import torch

    return int(torch.cuda.max_memory_reserved()) if torch.cuda.is_initialized() else 0


def peak_resident_bytes() -> int:
    """The most resident memory this process has had, as the kernel counts it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
