"""Publishes a running job's metrics: a page to scrape, or a file for node_exporter's textfile collector.

Names follow Prometheus' rules: base units, `_total` for counters, ratios from 0 to 1. The metrics are computed from the
latest progress whenever they are requested.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from dsquant.errors import InputError, UsageError
from dsquant.escaping import printable
from dsquant.reporting.progress import Limits, Progress, Report, gpu_bytes, resident_bytes

# The file is written at most this often, and at once where a layer is finished or the job ends.
SECONDS_BETWEEN_WRITES = 5.0
LOOPBACK = "127.0.0.1"
LAST_SUCCESS = "dsquant_last_success_timestamp_seconds"
GATE_PASSED = "dsquant_gate_passed"
LOSSES = {"attention": "attention_error", "mlp": "mlp_error"}


@contextmanager
def monitored(
    report: Report,
    metrics_file: Path | None = None,
    metrics_port: int | None = None,
    metrics_address: str | None = None,
) -> Iterator[Report]:
    """Publishes the progress of the jobs that run inside, and yields what a job reports to.

    `metrics_file` is a .prom file for node_exporter's textfile collector, replaced as a whole. `metrics_port` serves a
    page for Prometheus while the job runs, on `metrics_address`; without one only this machine reaches it. Raises
    InputError where the file's folder is missing, UsageError where the file has another ending, the address or port
    cannot be opened, or an address has no port.
    """
    if metrics_address is not None and metrics_port is None:
        raise UsageError("--metrics-address does nothing without --metrics-port")
    if metrics_file is None and metrics_port is None:
        yield report
        return
    last_success, gates = _earlier(metrics_file)
    state = _JobState(last_success, earlier_gates=gates)
    registry = CollectorRegistry()
    registry.register(state)
    server = None if metrics_port is None else _serve(metrics_address, metrics_port, registry)
    written = 0.0

    def write(now: float) -> None:
        nonlocal written
        if metrics_file is not None:
            write_to_textfile(str(metrics_file), registry)
            written = now

    def publish(progress: Progress) -> None:
        report(progress)
        state.note(progress)
        now = time.monotonic()
        if progress.layer is not None or progress.limits is not None or now - written >= SECONDS_BETWEEN_WRITES:
            write(now)

    try:
        write(0.0)
        yield publish
        state.last_success = time.time()
    finally:
        state.running = False
        write(0.0)
        if server is not None:
            server.shutdown()
            server.server_close()


def _serve(address: str | None, port: int, registry: CollectorRegistry) -> Any:
    address = LOOPBACK if address is None else address
    try:
        if not address:  # which would mean every interface
            raise ValueError("no address")
        server, _ = start_http_server(port, address, registry)
    except (OSError, OverflowError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--metrics-port {port} on {address!r}: {reason}; choose another port, or an address of this machine"
        ) from error
    return server


def _earlier(metrics_file: Path | None) -> tuple[float | None, dict[str, bool]]:
    """Returns when the last job that wrote this file succeeded, and its gates: both stay until there is news."""
    if metrics_file is None:
        return None, {}
    if metrics_file.suffix != ".prom":
        raise UsageError(f"--metrics-file {metrics_file}: node_exporter reads only files whose name ends in .prom")
    if not metrics_file.parent.is_dir():
        raise InputError(f"--metrics-file {metrics_file}: the folder {metrics_file.parent} is missing")
    if not metrics_file.is_file():
        return None, {}
    try:
        families = list(text_string_to_metric_families(metrics_file.read_bytes().decode()))
    except ValueError as error:
        raise InputError(f"{metrics_file} exists already and holds no metrics ({error}); name another") from error
    samples = [sample for family in families for sample in family.samples]
    gates = {sample.labels["gate"]: bool(sample.value) for sample in samples if sample.name == GATE_PASSED}
    return next((float(sample.value) for sample in samples if sample.name == LAST_SUCCESS), None), gates


@dataclass(eq=False)
class _JobState(Collector):
    """The latest progress of a job, and its metrics."""

    last_success: float | None
    earlier_gates: Mapping[str, bool]
    """Gates of the last job; they stay where this one had nothing to do."""
    running: bool = True
    last_progress: float = field(default_factory=time.time)
    progress: Progress | None = None
    limits: Limits | None = None
    steps: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Stage -> done and total."""
    seconds: dict[str, float] = field(default_factory=dict)
    layers: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    gates: dict[str, bool] = field(default_factory=dict)
    _moment: float = field(default_factory=time.monotonic)

    def note(self, progress: Progress) -> None:
        """Records a step."""
        now = time.monotonic()
        if self.progress is not None:
            stage = self.progress.stage
            self.seconds = {**self.seconds, stage: self.seconds.get(stage, 0.0) + now - self._moment}
        self._moment, self.last_progress, self.progress = now, time.time(), progress
        self.steps = {**self.steps, progress.stage: (progress.done, progress.total)}
        self.limits = progress.limits or self.limits
        if progress.layer is not None:
            self.layers = {**self.layers, int(progress.layer["layer"]): progress.layer}
        self.gates = {**self.gates, **{printable(gate): outcome for gate, outcome in (progress.gates or {}).items()}}

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics as of now."""
        yield GaugeMetricFamily("dsquant_running", "1 while a job runs, 0 when it has ended.", float(self.running))
        yield GaugeMetricFamily("dsquant_last_progress_timestamp_seconds", "When the job took its last step.",
                                self.last_progress)  # fmt: skip
        if self.last_success is not None:
            yield GaugeMetricFamily(LAST_SUCCESS, "When a job last ended well.", self.last_success)
        yield from self._progress()
        yield from self._losses()
        yield from self._resources()
        gates = self.earlier_gates if self.progress is None else self.gates
        if gates:
            passed = GaugeMetricFamily(GATE_PASSED, "1 where a quality gate passed, 0 where it failed.",
                                       labels=["gate"])  # fmt: skip
            for gate, outcome in gates.items():
                passed.add_metric([gate], float(outcome))
            yield passed

    def _progress(self) -> Iterator[Metric]:
        units, tensors = self.steps.get("quantize", (0, 0)), self.steps.get("scan", (0, 0))
        for name, steps, what in (("layers", units, "Decoder layers, embedding and head"),
                                  ("tensors", tensors, "Source tensors")):  # fmt: skip
            done = "finished" if name == "layers" else "checked"
            yield GaugeMetricFamily(f"dsquant_{name}_done", f"{what} that are {done}.", steps[0])
            yield GaugeMetricFamily(f"dsquant_{name}", f"{what} of the job.", steps[1])
        ratio = GaugeMetricFamily("dsquant_stage_done_ratio", "Finished share of a stage.", labels=["stage"])
        for stage, (done_steps, total) in self.steps.items():
            ratio.add_metric([stage], done_steps / total if total else 0.0)
        yield ratio
        spent = CounterMetricFamily("dsquant_stage_seconds", "Time spent in a stage.", labels=["stage"])
        for stage, seconds in self.seconds.items():
            spent.add_metric([stage], seconds)
        yield spent
        latest = self.progress
        read, written, tokens = (latest.bytes_read, latest.bytes_written, latest.tokens) if latest else (0, 0, 0)
        yield CounterMetricFamily("dsquant_read_bytes", "Tensor data read.", read)
        yield CounterMetricFamily("dsquant_written_bytes", "Tensor data written.", written)
        yield CounterMetricFamily("dsquant_tokens", "Calibration tokens through this run's finished layers.", tokens)

    def _losses(self) -> Iterator[Metric]:
        labels = ["layer", "part", "grid"]
        before, after = (
            GaugeMetricFamily(f"dsquant_loss_{name}_ratio", f"Squared output error, relative to the output, {text}.",
                              labels=labels)
            for name, text in (("before", "under plain rounding"), ("after", "as written"))
        )  # fmt: skip
        for index, layer in self.layers.items():
            for number, grid in enumerate(layer.get("grids", [])):
                for part, key in LOSSES.items():
                    if grid.get(key) is not None:
                        before.add_metric([str(index), part, str(number)], grid[f"{key}_plain"])
                        after.add_metric([str(index), part, str(number)], grid[key])
        yield before
        yield after
        rare = sum(len(layer["topped_up"]) for layer in self.layers.values())
        experts = sum(len(layer["tokens_per_expert"]) for layer in self.layers.values())
        yield GaugeMetricFamily("dsquant_experts_undercovered", "Experts with fewer than 256 tokens.", rare)
        yield GaugeMetricFamily("dsquant_experts", "Experts of all finished layers.", experts)

    def _resources(self) -> Iterator[Metric]:
        used = GaugeMetricFamily("dsquant_memory_used_bytes", "Memory in use now.", labels=["device"])
        used.add_metric(["host"], resident_bytes())
        on_gpu = gpu_bytes() if "torch" in sys.modules else 0
        if on_gpu:
            used.add_metric(["gpu"], on_gpu)
        yield used
        if self.limits is None:
            return
        budget = GaugeMetricFamily("dsquant_memory_budget_bytes", "The most that may be used.", labels=["device"])
        budget.add_metric(["host"], self.limits.memory_bytes)
        if self.limits.gpu_memory_bytes:
            budget.add_metric(["gpu"], self.limits.gpu_memory_bytes)
        yield budget
        output = self.limits.output.absolute()
        existing = next(path for path in (output, *output.parents) if path.exists())
        disk = os.statvfs(existing)
        there = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        needed = max(0, self.limits.disk_bytes - there) if self.running else 0
        yield GaugeMetricFamily("dsquant_disk_needed_bytes", "What the job has still to write at most.", needed)
        yield GaugeMetricFamily("dsquant_disk_free_bytes", "Free space there.", disk.f_bavail * disk.f_frsize)
