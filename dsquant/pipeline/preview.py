"""Describes the output of a job from headers alone, before it runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsquant.options import format_size
from dsquant.reporting.notebook import as_html

STATES = {
    "new": "new",
    "resume": "exists: an interrupted job, which will be continued",
    "restart": "exists: will be started over",
    "finished": "exists: a finished output; nothing to do",
    "interrupted, in the way": "exists: an interrupted job; continue with --resume, start over with --restart",
    "finished, in the way": "exists: a finished output; start over with --restart, or name another folder",
}


@dataclass(frozen=True)
class Preview:
    """The planned output of a job, and its needs."""

    model: str
    architecture: str
    output: Path
    state: str
    """new, resume, restart or finished: what the output folder holds already."""
    source_bytes: int
    output_bytes: dict[str, int]
    """Format or file -> bytes."""
    details: dict[str, Any]
    calibration: dict[str, Any] | None
    """Where the calibration tokens come from, with their hash; None without calibration."""
    notes: list[str]
    memory_bytes: int
    """Resident memory that the run needs, with what the process holds already."""
    memory_budget_bytes: int
    work_disk_bytes: int
    """Disk for hidden states while the run lasts."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "output": str(self.output)}

    def __str__(self) -> str:
        texts = "none"
        if self.calibration:
            parts = ", ".join(f"{source['name']} {source['samples']}" for source in self.calibration["sources"])
            samples = self.calibration["samples"]
            texts = f"{samples} sample{'s' * (samples != 1)} of {self.calibration['seq_len']} tokens ({parts})"
        rows = {
            "model": f"{self.model} ({self.architecture}, {format_size(self.source_bytes)})",
            "output folder": f"{self.output} ({STATES[self.state]})",
            **{f"  {name}": format_size(size) for name, size in self.output_bytes.items()},
            **self.details,
            "calibration": texts,
            "memory": f"{format_size(self.memory_bytes)} of a budget of {format_size(self.memory_budget_bytes)}",
            "disk beside the output": f"{format_size(self.work_disk_bytes)} for hidden states, while the run lasts",
        }
        width = max(map(len, rows)) + 2
        return "\n".join(
            [f"{name:{width}}{value}" for name, value in rows.items()] + [f"Note: {n}." for n in self.notes]
        )

    def _repr_html_(self) -> str:
        return as_html([str(self)])
