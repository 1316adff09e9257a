"""Every command that shares its work, on one GPU and on several: seconds, what limits them, and equal results.

    python -m benchmarks.r1_ranks --folder /tmp/r1-ranks --ranks 1 2 [--experts 64] [--only 'quality|gguf'] [--kill]
    python -m benchmarks.r1_ranks --folder /tmp/small --ranks 1 2 --model dsquant/assets/tiny-r1 --device cpu \
        --samples 5 --few 3 --seq-len 128 --kill

makes layers of R1's geometry in the folder (FP8, random weights) or takes a model, and runs each command on every
number of ranks, one after the other, in process groups that stay (benchmarks/ranks_worker): imports, CUDA's start and
the joining of ranks are in no figure. A line is printed as soon as it is measured.

The source is dropped from the page cache before each command. `disk` is what the kernel says was read and written
meanwhile, by all ranks, over the rates measured first; on /dev/shm it is nothing. `n/1` compares with the first number
of ranks: n times the time beyond the disk's, over its; 1 would be a perfect share. The last column is where the main
thread of rank 0 and, behind the bar, those of the others were on average: `alone` is what rank 0 does while others
wait, `exchange` contains the wait for slower ranks. `--kill` kills the last rank of the largest number after a layer,
and has the smallest number resume.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.r1_layer import disk_rates
from benchmarks.r1_width import make_checkpoint
from dsquant.files.sealing import hash_files

# Of an evaluation's report: what it took, not what it found.
TAKEN = ("elapsed_s", "peak_resident_bytes", "bytes_read")
QUALITY = "awq quality"
COMMANDS = {
    QUALITY: ["awq", "--preset", "quality", "--to", "awq"],
    "gguf Q4_K_M": ["gguf", "--type", "Q4_K_M"],
    "eval": ["eval"],
    "verify": ["verify"],
    "awq --target-bits 5": ["awq", "--preset", "quality", "--to", "compressed-tensors", "--target-bits", "5"],
    "gguf IQ2_XXS": ["gguf", "--type", "IQ2_XXS"],
    "awq best": ["awq", "--preset", "best", "--to", "awq"],
}


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


def results_of(kind: str, output: Path, told: str) -> dict[str, str]:
    """What has to be equal: the hash of every file of a job, or what a report says."""
    if kind in ("awq", "gguf"):
        names = [str(path.relative_to(output)) for path in sorted(output.rglob("*")) if path.is_file()]
        return {name: entry["sha256"] for name, entry in hash_files(output, names, lambda name: None).items()}
    found = json.loads(told)
    for name in TAKEN if kind == "eval" else ():
        del found["identity"][name]
    return {key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for key, value in found.items()}


class Bench:
    """The source, the groups of ranks and what the first of each command found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.threads = max(1, (os.cpu_count() or 1) // max(options.ranks))
        self.groups = {size: self._group(size) for size in options.ranks}  # they import while the source is made
        self.model = self._source()
        self.num_layers = json.loads((self.model / "config.json").read_text())["num_hidden_layers"]
        self.rates = disk_rates(self.folder, self.model, 1 if options.model else 16)
        self.first: dict[str, tuple[dict[str, str], dict[str, float]]] = {}

    def _group(self, size: int) -> Group:
        return Group(size, self.folder, self.options.device, self.threads)

    def _source(self) -> Path:
        """The model's path, made where it is not there; beside it tokens and a text."""
        options, folder = self.options, self.folder
        model: Path = options.model or folder / "model"
        if not model.exists():
            make_checkpoint(model, options.experts, layers=options.layers, device=options.device)
        shape = (max(options.samples, options.few), options.seq_len)
        most = json.loads((model / "config.json").read_text())["vocab_size"]
        tokens = torch.randint(3, most, shape, generator=torch.Generator().manual_seed(0))
        save_file({"tokens": tokens}, folder / "tokens.safetensors")
        letters, draw = "etaoinshrdlu ", random.Random(0)
        (folder / "text.txt").write_text("".join(draw.choices(letters, k=8 * options.few * options.seq_len)))
        os.sync()  # what is not on disk cannot be dropped from the page cache
        return model

    def arguments(self, name: str, output: Path) -> list[str]:
        """A command line for a command of the table."""
        options, (kind, *own), model = self.options, COMMANDS[name], str(self.model)
        made = str(self.output(QUALITY))
        if kind == "verify":
            return [kind, made, "--source", model, "--json"]
        machine = ["--json", "--output", str(output), "--device", options.device, "--memory-budget", "48GiB"]
        length = ["--seq-len", str(options.seq_len)]
        if kind == "eval":
            text = ["--text", str(self.folder / "text.txt"), "--samples", str(options.few), *length]
            return [kind, model, made, *text, *machine, "--prompts", "none"]
        samples = options.samples if name == QUALITY else options.few
        tokens = ["--calibration", str(self.folder / "tokens.safetensors"), "--samples", str(samples), *length]
        return [kind, model, *own, *tokens, *machine, "--no-evaluate", "--resume"]

    def output(self, name: str) -> Path:
        return self.folder / f"out-{re.sub('[^A-Za-z0-9_]+', '-', name)}"

    def run(self, name: str, size: int) -> tuple[list[dict[str, Any]], dict[str, str]] | None:
        """Runs a command; what its ranks took, and its results, None where it failed."""
        if not self.groups[size].alive:
            self.groups[size] = self._group(size)
        output, group = self.output(name), self.groups[size]
        shutil.rmtree(output, ignore_errors=True)
        self._drop_cache()
        group.begin(self.arguments(name, output))
        taken = group.end()
        return None if taken is None else (taken, results_of(COMMANDS[name][0], output, taken[0]["told"]))

    def _drop_cache(self) -> None:
        for folder in (self.model, self.output(QUALITY)):
            for path in folder.glob("*.safetensors"):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def measure(self, name: str, size: int) -> None:
        """Runs a command and prints its lines."""
        found = self.run(name, size)
        if found is None:
            codes = [process.wait() for process in self.groups[size].processes]
            print(f"| {name} | | {size} | | | | ended with {', '.join(map(str, codes))} | |", flush=True)
            return
        taken, results = found
        measured = list(parts(taken, self.num_layers, self.rates))
        beyond = {part.name: part.seconds - part.disk_s for part in measured}
        before, times = self.first.setdefault(name, (results, {part: size * value for part, value in beyond.items()}))
        is_first = before is results
        different = [one for one in before | results if before.get(one) != results.get(one)]
        outcome = f"DIFFERENT: {', '.join(different)}" if different else f"{len(results)}{'' if is_first else ' equal'}"
        for part in measured:
            ratio = size * beyond[part.name] / times[part.name] if times.get(part.name, 0) > 0 else float("nan")
            row = f"{name} | {part.name} | {size} | {part.seconds:.1f} | {part.disk_s:.1f} | {ratio:.2f}"
            print(f"| {row} | {outcome} | {part.limits} |", flush=True)

    def kill(self) -> None:
        """Kills a rank of a job once its first layer is journaled; another number of ranks resumes."""
        size, fewer = max(self.options.ranks), min(self.options.ranks)
        if not self.groups[size].alive:
            self.groups[size] = self._group(size)
        group, output = self.groups[size], self.output(QUALITY)
        wanted = self.first[QUALITY][0] if QUALITY in self.first else None
        shutil.rmtree(output, ignore_errors=True)
        group.begin(self.arguments(QUALITY, output))
        journal = output / ".dsquant-work" / "journal.jsonl"
        while group.alive and not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
            time.sleep(0.01)
        started = time.monotonic()
        group.processes[-1].send_signal(signal.SIGKILL)
        codes = [process.wait() for process in group.processes]
        words = f"rank {size - 1} killed: ended with {', '.join(map(str, codes))}"
        print(f"| {QUALITY} | {words} | {size} | {time.monotonic() - started:.1f} | | | | |", flush=True)
        self.groups[fewer].begin(self.arguments(QUALITY, output))
        taken = self.groups[fewer].end()
        outcome = "failed" if taken is None else "equal"
        if taken is not None and wanted is not None and results_of("awq", output, "") != wanted:
            outcome = "DIFFERENT"
        seconds = "" if taken is None else f"{taken[0]['ended'] - taken[0]['begun']:.1f}"
        print(f"| {QUALITY} | resumed | {fewer} | {seconds} | | | {outcome} | |", flush=True)

    def all(self) -> None:
        """Runs everything that was requested."""
        print(f"disk: {self.rates[0] / 1e9:.2f} GB/s read, {self.rates[1] / 1e9:.2f} GB/s written and synced\n")
        print("| command | part | ranks | seconds | disk | n/1 | results | where rank 0 \\| the others were, s |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        wanted = [name for name in COMMANDS if re.search(self.options.only, name)]
        for name in wanted:
            if COMMANDS[name][0] in ("eval", "verify") and not self.output(QUALITY).exists():
                self.run(QUALITY, min(self.options.ranks))  # what is evaluated
            for size in self.options.ranks:
                self.measure(name, size)
            if name != QUALITY:
                shutil.rmtree(self.output(name), ignore_errors=True)
        if self.options.kill:
            self.kill()


def main() -> None:
    """Makes the source where it is not there, runs, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk that is measured, or /dev/shm")
    parser.add_argument("--ranks", type=int, nargs="+", required=True, help="numbers of ranks, the smallest first")
    parser.add_argument("--only", default="", metavar="REGEX", help=f"of {', '.join(COMMANDS)}")
    parser.add_argument("--model", type=Path, help="this model instead of layers of R1's geometry")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32, help=f"of {QUALITY}")
    parser.add_argument("--few", type=int, default=8, help="samples of all others")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kill", action="store_true")
    started = time.monotonic()
    bench = Bench(parser.parse_args())
    try:
        bench.all()
        print(f"\n{time.monotonic() - started:.0f} s in all")
    finally:
        for group in bench.groups.values():
            group.close()


if __name__ == "__main__":
    main()
