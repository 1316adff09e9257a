"""A checkpoint of R1's depth and width with few experts through every command: time and memory, layer by layer.

    python -m benchmarks.r1_depth --folder /dev/shm/depth [--outputs /tmp/depth] [--experts 8] [--steps killed whole]
    python -m benchmarks.r1_depth --folder /tmp/small --model dsquant/assets/tiny-r1 --device cpu --samples 4

makes 61 layers (FP8, random weights; 40 GB with 8 experts), has `awq` write two formats beside the release's FP8, once
killed twice with SIGKILL and resumed and once in one go, compares every file, and verifies, evaluates and converts to
GGUF. A row of the table is a range of layers: mean seconds of one, the most GPU memory (PyTorch's allocations) and
anonymous host memory meanwhile. Weights are random: this measures time and memory.
"""

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.r1_ranks import results_of
from benchmarks.r1_width import make_checkpoint

LAYERS, DENSE = 61, 3
GIB = 2**30
ROWS = 8
SAMPLED_S = 0.02
STEPS = ("killed", "whole", "verify", "evaluate", "gguf")
FORMATS = ("compressed-tensors", "nvfp4")
LAYERED = ("quantize", "evaluate")


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["RssAnon"].split()[0]) * 1024


def watched(marks: Path, arguments: list[str]) -> None:
    """Runs dsquant's command line, and notes in a file what each step found: when it began, and the peaks before it."""
    from dsquant.cli import main as cli
    from dsquant.reporting import terminal
    from dsquant.reporting.progress import Progress

    peak = [0]
    seen: set[tuple[str, int]] = set()

    def sample() -> None:
        while True:
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(SAMPLED_S)

    threading.Thread(target=sample, daemon=True).start()
    with marks.open("a") as file:

        def note(step: Progress) -> None:
            if (step.stage, step.done) in seen:
                return
            seen.add((step.stage, step.done))
            gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
            file.write(json.dumps([time.monotonic(), step.stage, step.done, gpu, peak[0]]) + "\n")
            file.flush()
            peak[0] = 0
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()

        # a command imports it when it runs
        terminal.progress_bar = lambda visible=True: contextlib.nullcontext(note)  # type: ignore[assignment, return-value]
        cli.main(arguments, prog_name="dsquant")


class Job:
    """A command in a process of its own."""

    def __init__(self, name: str, folder: Path, arguments: list[str]) -> None:
        self.name, self.marks, self.told = name, folder / f"{name}.marks", folder / f"{name}.told"
        self.command = [sys.executable, "-m", "benchmarks.r1_depth", "--watched", str(self.marks), *arguments]
        self.marks.unlink(missing_ok=True)

    def start(self) -> subprocess.Popen[bytes]:
        with self.told.open("wb") as file:
            return subprocess.Popen(self.command, stdout=file)

    def run(self) -> float:
        """Runs it to its end; seconds."""
        started = time.monotonic()
        if code := self.start().wait():
            raise SystemExit(f"{self.name} ended with {code}")
        return time.monotonic() - started

    def kill_after(self, journal: Path, units: int) -> None:
        """Starts it, and kills it once so many units are journaled."""
        process = self.start()
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= units):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        units, size = journal.read_bytes().count(b"\n"), journal.stat().st_size
        print(f"{self.name}: killed with {units} units journaled, in {size / 1e6:.2f} MB", flush=True)

    def rows(self, num_layers: int) -> Iterator[str]:
        """Rows of a table: ranges of layers, seconds of one, peaks."""
        marks = [json.loads(line) for line in self.marks.read_text().splitlines()]
        begins = {done: moment for moment, stage, done, _, _ in reversed(marks) if stage in LAYERED}
        peaks, since = dict[int, tuple[int, int]](), (0, 0)
        for _, stage, done, gpu, host in marks:  # each mark has the peaks since the one before, of whatever stage
            since = max(since[0], gpu), max(since[1], host)
            if stage in LAYERED:
                peaks[done - 1], since = since, (0, 0)
        first = min(begins, default=0) + (
            1 if len(begins) > num_layers + 1 else 0
        )  # the embedding is a unit of its own
        edges = sorted({0, min(DENSE, num_layers), *(num_layers * part // ROWS for part in range(1, ROWS + 1))})
        for begin, end in pairwise(edges):
            if first + begin in begins and first + end in begins:
                seconds = (begins[first + end] - begins[first + begin]) / (end - begin)
                gpu, host = (max(peaks[first + n][place] for n in range(begin, end)) / GIB for place in (0, 1))
                yield f"| {self.name} | {begin} to {end - 1} | {seconds:.2f} | {gpu:.2f} | {host:.2f} |"


class Depth:
    """The checkpoint, and what is run on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.outputs = options, options.outputs or options.folder
        self.model: Path = options.model or options.folder / "model"
        self._machine = ["--device", options.device, "--memory-budget", "32GiB", "--json"]
        for folder in (options.folder, self.outputs):
            folder.mkdir(parents=True, exist_ok=True)
        if not self.model.exists():
            started = time.monotonic()
            make_checkpoint(self.model, options.experts, LAYERS, DENSE, options.device)
            size = sum(path.stat().st_size for path in self.model.iterdir())
            print(f"made {size / 1e9:.1f} GB in {time.monotonic() - started:.0f} s", flush=True)
        config = json.loads((self.model / "config.json").read_text())
        self.num_layers = config["num_hidden_layers"]
        shape = (options.samples, options.seq_len)
        tokens = torch.randint(3, config["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
        save_file({"tokens": tokens}, options.folder / "tokens.safetensors")
        self.hashes = options.folder / "hashes.json"
        self.texts = options.folder / "text.txt"
        self.texts.write_text("def f(x):\n    return x\n" * options.samples * options.seq_len)

    def job(self, name: str, arguments: list[Any]) -> Job:
        return Job(name, self.options.folder, list(map(str, arguments)))

    def quantizing(self, name: str, output: Path) -> Job:
        to = [word for name in FORMATS for word in ("--to", name)]
        own = ["--preset", "quality", *self._calibrated(output), "--no-evaluate", "--resume"]
        return self.job(name, ["awq", self.model, *to, *own])

    def _calibrated(self, output: Path) -> list[Any]:
        texts = ["--calibration", self.options.folder / "tokens.safetensors", "--samples", self.options.samples]
        return [*texts, "--seq-len", self.options.seq_len, "--output", output, *self._machine]

    def killed(self) -> None:
        """Runs the job that is killed after a third and two thirds of the layers, keeps its hashes, and removes it."""
        output, started = self.outputs / "killed", time.monotonic()
        job = self.quantizing("awq, killed twice", output)
        for part in (1, 2):
            job.kill_after(output / ".dsquant-work" / "journal.jsonl", self.num_layers * part // 3)
        job.run()
        print(f"{job.name} and resumed: {time.monotonic() - started:.0f} s", flush=True)
        self.hashes.write_text(json.dumps(results_of("awq", output, "")))
        shutil.rmtree(output)

    def whole(self) -> None:
        """Runs the same in one go, and compares every file with those of the killed job, if that was run."""
        job = self.quantizing("awq", self.outputs / "whole")
        self._run(job)
        if self.hashes.exists():
            found, other = results_of("awq", self.outputs / "whole", ""), json.loads(self.hashes.read_text())
            differ = [name for name in found | other if found.get(name) != other.get(name)]
            print(f"{len(found)} files, {'DIFFERENT: ' + ', '.join(differ) if differ else 'equal'}", flush=True)
        records = sum(path.stat().st_size for path in (self.outputs / "whole").rglob("dsquant.*"))
        print(f"records beside the weights: {records / 1e6:.2f} MB", flush=True)

    def verify(self) -> None:
        self._run(self.job("verify", ["verify", self.outputs / "whole", "--source", self.model, "--json"]))

    def evaluate(self) -> None:
        candidates = [self.outputs / "whole" / name for name in FORMATS]
        text = ["--text", self.texts, "--samples", self.options.samples, "--seq-len", self.options.seq_len]
        report = ["--prompts", "none", "--output", self.options.folder / "report", *self._machine]
        self._run(self.job("eval of both", ["eval", self.model, *candidates, *text, *report]))

    def gguf(self) -> None:
        """Converts, in place of one of the formats, so that source and outputs find room in 128 GiB."""
        shutil.rmtree(self.outputs / "whole" / FORMATS[-1], ignore_errors=True)
        own = ["--type", "Q4_K_M", *self._calibrated(self.outputs / "gguf"), "--no-evaluate"]
        self._run(self.job("gguf Q4_K_M", ["gguf", self.model, *own]))

    def _run(self, job: Job) -> None:
        print(f"{job.name}: {job.run():.0f} s", flush=True)
        for line in job.rows(self.num_layers):
            print(line, flush=True)


def main() -> None:
    """Parses the command line; in a process that is watched, runs dsquant's."""
    if sys.argv[1:2] == ["--watched"]:
        watched(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the source, and of what is noted")
    parser.add_argument("--outputs", type=Path, help="of the others; FOLDER")
    parser.add_argument("--model", type=Path, help="this model instead of one of R1's depth")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="in this order")
    options = parser.parse_args()
    depth = Depth(options)
    print("| command | layers | seconds a layer | GPU GiB | host GiB |\n|---|---|---|---|---|", flush=True)
    for step in options.steps:
        getattr(depth, step)()


if __name__ == "__main__":
    main()
