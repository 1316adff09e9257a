"""Process groups that run dsquant's commands for benchmarks/r1_ranks, and what went into a command's time."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Group:
    """Processes that have joined as ranks and wait for commands."""

    size: int
    folder: Path
    device: str
    threads: int
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    joined: bool = False

    def __post_init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": self.size, "LOCAL_WORLD_SIZE": self.size, "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": port, "OMP_NUM_THREADS": self.threads, "NCCL_NVLS_ENABLE": 0}
        for rank in range(self.size):
            own = {"RANK": rank, "LOCAL_RANK": rank, "RANKS_RESULT": self._result(rank)}
            if self.device == "cuda":
                own["CUDA_VISIBLE_DEVICES"] = rank
            environment = {name: str(value) for name, value in (shared | own).items()}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.ranks_worker"],
                    env={**os.environ, **environment},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def _result(self, rank: int) -> Path:
        return self.folder / f"rank-{self.size}-{rank}.json"

    def begin(self, arguments: Sequence[str]) -> None:
        """Starts a command on all ranks, once they have joined."""
        self.joined = self.joined or self._heard("joined")
        for rank in range(self.size):
            self._result(rank).unlink(missing_ok=True)
        stdin = self.processes[0].stdin
        assert stdin is not None
        stdin.write(json.dumps(list(arguments)) + "\n")
        stdin.flush()

    def _heard(self, word: str) -> bool:
        """Waits until rank 0 says a word; False where it ends before."""
        stdout = self.processes[0].stdout
        assert stdout is not None
        return any(line.strip() == word for line in iter(stdout.readline, ""))

    def end(self) -> list[dict[str, Any]] | None:
        """Waits for the command's end; what each rank took, None where it failed."""
        self._heard("done")
        found = [self._result(rank) for rank in range(self.size)]
        taken = [json.loads(path.read_text()) for path in found if path.exists()]
        return taken if len(taken) == self.size and not any(one["code"] for one in taken) else None

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def close(self) -> None:
        """Has the ranks leave, and waits for them."""
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Part:
    """A part of a command: seconds, and what they went into."""

    name: str
    seconds: float
    disk_s: float
    limits: str


def parts(taken: list[dict[str, Any]], num_layers: int, rates: tuple[float, float]) -> Iterator[Part]:
    """The whole of a command, its last layer, and what comes before or behind layers in some."""
    first = taken[0]
    starts: dict[tuple[str, int], float] = {}
    for moment, stage, done in first["marks"]:
        starts.setdefault((stage, done), moment)
    windows = {}
    if "sensitivity" in (stages := [stage for stage, _ in starts]):
        windows["measuring"] = (starts["sensitivity", 0], starts["quantize", 0])
    before = num_layers if "quantize" in stages else num_layers - 1  # the embedding is a unit of its own
    stage = "quantize" if "quantize" in stages else "evaluate"
    if (stage, before) in starts and (stage, before + 1) in starts:
        windows["last layer"] = (starts[stage, before], starts[stage, before + 1])
    windows["all"] = (first["begun"], first["ended"])
    for name, (begin, end) in windows.items():
        disk = [[_disk(one["disk"], moment) for moment in (begin, end)] for one in taken]
        amounts = (sum(stop[place] - start[place] for start, stop in disk) for place in (1, 2))
        disk_s = sum(amount / rate for amount, rate in zip(amounts, rates, strict=True))
        yield Part(name, end - begin, disk_s, _limits(taken, begin, end))


def _disk(samples: list[list[float]], moment: float) -> list[float]:
    """The last sample before a moment, or the first."""
    return next((one for one in reversed(samples) if one[0] <= moment), samples[0])


def _limits(taken: list[dict[str, Any]], begin: float, end: float) -> str:
    """The seconds of rank 0 and of the others, on average, in what they wait for."""
    sums: list[dict[str, float]] = []
    for one in taken:
        sums.append({})
        for name, start, stop in one["spans"]:
            inside = min(stop, end) - max(start, begin)
            if inside > 0:
                sums[-1][name] = sums[-1].get(name, 0.0) + inside
    words = []
    for name in sorted({name for found in sums for name in found}):
        others = [found.get(name, 0.0) for found in sums[1:]]
        behind = f" \\| {sum(others) / len(others):.2f}" if others else ""
        words.append(f"{name} {sums[0].get(name, 0.0):.2f}{behind}")
    return ", ".join(words)
