"""Forecasts the cost of building an output: memory, disk, and hours for each stage, with the assumptions of each
number.
"""

import os
from dataclasses import dataclass

from dsquant.deployment import facts
from dsquant.deployment.facts import Range
from dsquant.deployment.hardware import Machine
from dsquant.deployment.sizes import OutputSize
from dsquant.deployment.subject import Subject
from dsquant.formats.table import format_of
from dsquant.recipes import FLOAT_TYPES
from dsquant.reporting.progress import resident_bytes

SEARCHED = "64 x 512 tokens run, scales, clips and rounding of every weight, as in a compact run"
CALIBRATED_TOKENS, EVALUATED_TOKENS = 64 * 512, 24 * 512


@dataclass(frozen=True)
class StageCost:
    """One stage of a job."""

    name: str
    hours: Range
    assumption: str


@dataclass(frozen=True)
class BuildCost:
    """Memory, disk and time to build an output."""

    output: OutputSize
    memory_bytes: int
    """Peak resident memory."""
    memory_assumption: str
    disk_bytes: int
    """Source, output and hidden states together."""
    disk_assumption: str
    stages: tuple[StageCost, ...]
    """On this machine's processor."""
    search_on_gpu: StageCost | None
    """Replaces everything but `evaluate`, where there is a GPU; None where a GPU has not been measured for this
    format."""
    evaluate_on_gpu: StageCost | None
    """Replaces `evaluate`, where there is a GPU; None where the output is decoded on the processor."""

    @property
    def hours(self) -> Range:
        """Total of all stages."""
        return _sum(self.stages)

    @property
    def hours_on_gpu(self) -> Range | None:
        """Total on a GPU; None where that has not been measured."""
        if self.search_on_gpu is None:
            return None
        evaluated = self.evaluate_on_gpu or next(stage for stage in self.stages if stage.name == "evaluate")
        return _sum((self.search_on_gpu, evaluated))


def _sum(stages: tuple[StageCost, ...]) -> Range:
    return Range(sum(stage.hours.low for stage in stages), sum(stage.hours.high for stage in stages))


def build_cost_of(output: OutputSize, subject: Subject, machine: Machine) -> BuildCost:
    """Forecasts a job; the source is read from the machine's disk, cores are this machine's."""
    weights, source_bytes, active = subject.num_weights, subject.source_bytes, subject.active_weights
    evaluated = 2 * (weights * facts.READ_S + active * facts.EVALUATE_S * EVALUATED_TOKENS)
    return BuildCost(
        output=output,
        memory_bytes=output.memory_bytes + resident_bytes(),
        memory_assumption="samples of 512 tokens; the largest stage of any layer, and this process at present",
        disk_bytes=source_bytes + output.num_bytes + output.work_bytes,
        disk_assumption=f"64 samples of 512 tokens; source {source_bytes / 2**30:,.2f} GiB, output next to it",
        stages=(
            _scan(weights, source_bytes, machine),
            *_quantize(output, subject),
            _cores("evaluate", evaluated, "original and output, 24 x 512 tokens"),
        ),
        search_on_gpu=_search_on_gpu(output, weights, source_bytes, machine),
        evaluate_on_gpu=None if _stored_type(output) else _evaluate_on_gpu(weights),
    )


def _search_on_gpu(output: OutputSize, weights: int, source_bytes: int, machine: Machine) -> StageCost | None:
    base, seconds, measured = _stored_type(output), facts.SEARCH_ON_GPU_S, facts.MEASURED_ON_GPU_IN
    if base is not None:
        if base in facts.STORE_S and base != "Q6_K":  # floats and Q8_0 are not searched
            return None
        seconds, measured = facts.STORE_ON_GPU_S, f"of Q4_K_M and IQ2_XXS; {facts.RANKS_MEASURED_IN}"
    hours, disk = seconds * (weights / 3600), _disk_hours(source_bytes, machine)
    slowest = Range(max(hours.low, disk.low), max(hours.high, disk.high))
    return StageCost("search on a GPU", slowest, f"as the disk allows; {measured}")


def _evaluate_on_gpu(weights: int) -> StageCost:
    hours = facts.EVALUATE_ON_GPU_S * (weights / 3600)
    return StageCost("evaluate on a GPU", hours, facts.RANKS_MEASURED_IN)


def _disk_hours(num_bytes: int, machine: Machine) -> Range:
    return Range(num_bytes / machine.disk_read.high / 3600, num_bytes / machine.disk_read.low / 3600)


def _scan(weights: int, source_bytes: int, machine: Machine) -> StageCost:
    processor = facts.SCAN_S * weights / _num_cores() / 3600
    disk = _disk_hours(source_bytes, machine)
    hours = Range(max(processor, disk.low), max(processor, disk.high))
    return StageCost("scan", hours, f"every byte read and hashed once; disk {machine.disk_source}")


def _quantize(output: OutputSize, subject: Subject) -> tuple[StageCost, ...]:
    base, weights = _stored_type(output), subject.num_weights
    is_narrow = int(subject.skeleton.config["hidden_size"]) < facts.NARROW_COLUMNS
    searched = weights * (facts.SEARCH_NARROW_S if is_narrow else facts.SEARCH_S)
    searched += subject.active_weights * facts.CALIBRATE_S * CALIBRATED_TOKENS
    if base is None:
        return (_cores("search", searched, SEARCHED),)
    store = _cores(
        "store", weights * facts.STORE_S.get(base, facts.STORE_OTHER_S), "ggml's quantizers with weighted columns"
    )
    if base in FLOAT_TYPES:
        return (store,)
    return (_cores("search", searched, SEARCHED + "; none with --calibration none"), store)


def _stored_type(output: OutputSize) -> str | None:
    return format_of(output.format).stored_type(output.format.partition(":")[2])


def _cores(name: str, core_seconds: float, what: str) -> StageCost:
    """Returns the hours of a stage, from all cores perfectly used to the two that were measured."""
    cores = _num_cores()
    hours = Range(core_seconds / max(cores, facts.MEASURED_CORES) / 3600, core_seconds / facts.MEASURED_CORES / 3600)
    return StageCost(
        name, hours, f"{what}; CPU, {facts.MEASURED_CORES} cores as measured to {cores} here ({facts.MEASURED_IN})"
    )


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
