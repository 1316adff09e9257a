"""Progress that a running job reports."""

import os
import re
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Stage = Literal["scan", "sensitivity", "quantize", "evaluate", "generate", "tasks", "hash", "verify"]


@dataclass(frozen=True)
class Limits:
    """Resources that a job may use and will need."""

    output: Path
    """The output folder."""
    memory_bytes: int
    """Limit of resident memory."""
    disk_bytes: int
    """Disk for the output and for temporary files of the job."""
    gpu_memory_bytes: int = 0
    """Limit of GPU memory; 0 where none is used."""


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
    """Calibration tokens passed through the layers that this run has finished."""
    limits: Limits | None = None
    """At the beginning of a job."""
    layer: Mapping[str, Any] | None = None
    """The record's entry of a layer, where this step finishes it."""
    gates: Mapping[str, bool] | None = None
    """Quality gates, and whether each passed, where this step is their evaluation."""


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Reports nothing."""


def resident_bytes() -> int:
    """Returns the resident memory of this process now."""
    return int(_process(os.getpid()).memory_info().rss)


@cache
def _process(pid: int) -> Any:
    """psutil's view of a process, which takes longer to make than to ask."""
    import psutil

    return psutil.Process(pid)


def gpu_bytes() -> int:
    """Returns the GPU memory that PyTorch holds in this process now; 0 where it has used no GPU."""
    import torch

    return int(torch.cuda.memory_reserved()) if torch.cuda.is_initialized() else 0


def peak_gpu_bytes() -> int:
    """Returns the peak GPU memory that PyTorch has held in this process; 0 where it has used no GPU."""
    import torch

    return int(torch.cuda.max_memory_reserved()) if torch.cuda.is_initialized() else 0


def peak_resident_bytes() -> int:
    """Returns the peak resident memory of this process, as the kernel counts it.

    On Linux not getrusage's, which starts with that of the process it was forked from: a notebook, a benchmark.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
