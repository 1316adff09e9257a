"""Resources of a machine for a job: a device, memory, disk."""

import os
from pathlib import Path

import torch

from dsquant.errors import InputError, UsageError
from dsquant.options import format_size

LARGEST_DEFAULT_BUDGET = 16 * 2**30


def resolved_device(device: str) -> str:
    """Returns `cpu` or `cuda`, for `auto` a GPU where there is one; raises UsageError for `cuda` without a GPU."""
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise UsageError("--device cuda: PyTorch finds no GPU here; leave --device out to compute on the CPU")
    return device if device != "auto" else ("cuda" if found else "cpu")


def default_memory_budget() -> int:
    """80 % of what is available now, divided among this machine's ranks, at most 16 GiB."""
    import psutil

    available = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(LARGEST_DEFAULT_BUDGET, int(available * 0.8))


def check_disk(output: Path, needed_bytes: int) -> None:
    """Raises InputError where the disk cannot hold the output, with what is there; it gives the bytes needed and
    free."""
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    there = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    statistics = os.statvfs(existing)
    free = statistics.f_bavail * statistics.f_frsize
    needed = needed_bytes - there
    if needed > free:
        raise InputError(
            f"{existing}: the output needs {format_size(needed)} more, {format_size(free)} are free; make room or "
            "name a folder on another disk"
        )
