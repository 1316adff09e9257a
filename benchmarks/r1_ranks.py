"""Every command that shares its work, on one GPU and on several: seconds, what limits them, and equal results.

    python -m benchmarks.r1_ranks --folder /tmp/r1-ranks --ranks 1 2 [--experts 64] [--only 'quality|gguf'] [--kill]
    python -m benchmarks.r1_ranks --folder /tmp/r1-256 --ranks 1 2 4 --layers 1 --experts 256 --only '^(eval|verify)$'
    python -m benchmarks.r1_ranks --folder /tmp/small --ranks 1 2 --model dsquant/assets/tiny-r1 --device cpu \
        --samples 5 --few 3 --seq-len 128 --kill
    python -m benchmarks.r1_ranks --folder /dev/shm/types --ranks 1 --layers 1 --only "^gguf" --types IQ1_S Q2_K

makes layers of R1's geometry in the folder (FP8, random weights) or takes a model, and runs each command on every
number of ranks, one after the other, in process groups that stay (benchmarks/ranks_worker): imports, CUDA's start and
the joining of ranks are in no figure. On GPUs each group first runs every command on a layer of 16 experts, all groups
at once, which compiles and loads kernels (`--cold` leaves that out). A line is printed as soon as it is measured, and
kept in the folder: the same command line run again goes on with what is left, so `--seconds 420` makes parts of it.

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
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.r1_layer import disk_rates
from benchmarks.r1_width import make_checkpoint
from benchmarks.ranks_group import Group, Part, parts
from dsquant.files.sealing import hash_files

# Of the layer on which commands are warmed up, the fewest that R1's choice of experts works with.
WARM_EXPERTS = 16
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


def results_of(kind: str, output: Path, told: str) -> dict[str, str]:
    """What has to be equal: the hash of every file of a job, or what a report says."""
    if kind in ("awq", "gguf"):
        names = [str(path.relative_to(output)) for path in sorted(output.rglob("*")) if path.is_file()]
        return {name: entry["sha256"] for name, entry in hash_files(output, names, lambda name: None).items()}
    found = json.loads(told)
    for name in TAKEN if kind == "eval" else ():
        del found["identity"][name]
    return {key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for key, value in found.items()}


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Yields where two JSON values differ, and how."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one | other:
            yield from differences(one.get(key), other.get(key), f"{where}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for place, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{where}/{place}")
    elif one != other:
        yield f"{where}: {one!r:.40} and {other!r:.40}"


@dataclass(frozen=True)
class Setting:
    """What commands run on."""

    model: Path
    made: Path
    """What `quality` makes of it, which is evaluated and verified."""
    samples: int
    """Of `quality`."""
    few: int
    """Of all others."""


@dataclass(frozen=True)
class Measured:
    """One command on one number of ranks."""

    results: dict[str, str]
    parts: list[Part]
    record: dict[str, Any]
    """The output's; empty where there is none."""


class Bench:
    """The source, the groups of ranks, and what has been measured in this folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.threads = max(1, (os.cpu_count() or 1) // max(options.ranks))
        self.groups = {size: self._group(size) for size in options.ranks}  # they import while the source is made
        self.model = self._source()
        self.setting = Setting(self.model, self.output(QUALITY), options.samples, options.few)
        self.num_layers = json.loads((self.model / "config.json").read_text())["num_hidden_layers"]
        self.rates = disk_rates(self.folder, self.model, 1 if options.model else 16)
        self.kept = self.folder / "measured.jsonl"
        self.measured: dict[tuple[str, int], Measured] = {}
        for line in self.kept.read_text().splitlines() if self.kept.exists() else ():
            name, size, results, found, record = json.loads(line)
            self.measured[name, size] = Measured(results, [Part(*part) for part in found], record)

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

    def arguments(self, name: str, output: Path, setting: Setting) -> list[str]:
        """A command line for a command of the table."""
        options, (kind, *own), model, made = self.options, COMMANDS[name], str(setting.model), str(setting.made)
        if kind == "verify":
            return [kind, made, "--source", model, "--json"]
        machine = ["--json", "--output", str(output), "--device", options.device, "--memory-budget", "48GiB"]
        length = ["--seq-len", str(options.seq_len)]
        if kind == "eval":
            text = ["--text", str(self.folder / "text.txt"), "--samples", str(setting.few), *length]
            return [kind, model, made, *text, *machine, "--prompts", "none"]
        samples = setting.samples if name == QUALITY else setting.few
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
        group.begin(self.arguments(name, output, self.setting))
        taken = group.end()
        return None if taken is None else (taken, results_of(COMMANDS[name][0], output, taken[0]["told"]))

    def _drop_cache(self) -> None:
        for folder in (self.model, self.output(QUALITY)):
            for path in folder.glob("*.safetensors"):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def measure(self, name: str, size: int) -> None:
        """Runs a command, unless that is done, and prints its lines."""
        if (name, size) not in self.measured:
            found = self.run(name, size)
            if found is None:
                codes = [process.wait() for process in self.groups[size].processes]
                print(f"| {name} | | {size} | | | | ended with {', '.join(map(str, codes))} | |", flush=True)
                return
            taken, results = found
            path = self.output(name) / "dsquant.json"
            record = json.loads(path.read_text()) if path.exists() else {}
            one = Measured(results, list(parts(taken, self.num_layers, self.rates)), record)
            self.measured[name, size] = one
            told = (name, size, results, [astuple(part) for part in one.parts], record)
            with self.kept.open("a") as file:
                file.write(json.dumps(told) + "\n")
        self._show(name, size)

    def _show(self, name: str, size: int) -> None:
        one, base = self.measured[name, size], min(self.options.ranks)
        first = self.measured.get((name, base), one)
        before = {part.name: base * (part.seconds - part.disk_s) for part in first.parts}
        names = first.results | one.results
        different = [file for file in names if first.results.get(file) != one.results.get(file)]
        equal = "" if first is one else " equal"
        outcome = f"DIFFERENT: {', '.join(different)}" if different else f"{len(names)}{equal}"
        for part in one.parts:
            beyond = before.get(part.name, 0.0)
            ratio = size * (part.seconds - part.disk_s) / beyond if beyond > 0 else float("nan")
            row = f"{name} | {part.name} | {size} | {part.seconds:.1f} | {part.disk_s:.1f} | {ratio:.2f}"
            print(f"| {row} | {outcome} | {part.limits} |", flush=True)
        for line in islice(differences(first.record, one.record), 6):
            print(f"  {line}", flush=True)

    def warm_up(self, names: Sequence[str]) -> None:
        """Runs commands on one small layer of the same width in all groups at once: kernels are compiled, libraries
        loaded and ranks connected."""
        model = self.folder / "warm-model"
        if not model.exists():
            make_checkpoint(model, WARM_EXPERTS, device=self.options.device)
        for size in self.groups:
            shutil.rmtree(self.folder / f"warm-{size}", ignore_errors=True)  # of a call that was stopped
        for name in [QUALITY, *(name for name in names if name != QUALITY)]:
            outputs = {size: self.folder / f"warm-{size}" / self.output(name).name for size in self.groups}
            for size, group in self.groups.items():
                setting = Setting(model, self.folder / f"warm-{size}" / self.output(QUALITY).name, 2, 2)
                group.begin(self.arguments(name, outputs[size], setting))
            for size, group in self.groups.items():
                if group.end() is None:
                    print(f"the warm-up of {name} failed on {size} ranks", flush=True)
                    self.groups[size] = self._group(size)
        for size in self.groups:
            shutil.rmtree(self.folder / f"warm-{size}", ignore_errors=True)

    def kill(self) -> None:
        """Kills a rank of a job once its first layer is journaled; another number of ranks resumes."""
        size, fewer = max(self.options.ranks), min(self.options.ranks)
        if not self.groups[size].alive:
            self.groups[size] = self._group(size)
        group, output = self.groups[size], self.output(QUALITY)
        first = self.measured.get((QUALITY, min(self.options.ranks)))
        wanted = None if first is None else first.results
        shutil.rmtree(output, ignore_errors=True)
        group.begin(self.arguments(QUALITY, output, self.setting))
        journal = output / ".dsquant-work" / "journal.jsonl"
        while group.alive and not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
            time.sleep(0.01)
        started = time.monotonic()
        group.processes[-1].send_signal(signal.SIGKILL)
        codes = [process.wait() for process in group.processes]
        words = f"rank {size - 1} killed: ended with {', '.join(map(str, codes))}"
        print(f"| {QUALITY} | {words} | {size} | {time.monotonic() - started:.1f} | | | | |", flush=True)
        self.groups[fewer].begin(self.arguments(QUALITY, output, self.setting))
        taken = self.groups[fewer].end()
        outcome = "failed" if taken is None else "equal"
        if taken is not None and wanted is not None and results_of("awq", output, "") != wanted:
            outcome = "DIFFERENT"
        seconds = "" if taken is None else f"{taken[0]['ended'] - taken[0]['begun']:.1f}"
        print(f"| {QUALITY} | resumed | {fewer} | {seconds} | | | {outcome} | |", flush=True)

    def all(self, started: float) -> None:
        """Runs everything that was requested, and is not done; begins no command after `--seconds`."""
        print(f"disk: {self.rates[0] / 1e9:.2f} GB/s read, {self.rates[1] / 1e9:.2f} GB/s written and synced\n")
        wanted = [name for name in COMMANDS if re.search(self.options.only, name)]
        missing = [name for name in wanted for size in self.options.ranks if (name, size) not in self.measured]
        if missing and self.options.device == "cuda" and not self.options.cold:
            self.warm_up(list(dict.fromkeys(missing)))
            print(f"warm after {time.monotonic() - started:.0f} s\n", flush=True)
        print("| command | part | ranks | seconds | disk | n/1 | results | where rank 0 \\| the others were, s |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for name in wanted:
            if name in missing and COMMANDS[name][0] in ("eval", "verify") and not self.output(QUALITY).exists():
                self.run(QUALITY, max(self.options.ranks))  # what is evaluated
            for size in self.options.ranks:
                if (name, size) in self.measured or time.monotonic() - started < self.options.seconds:
                    self.measure(name, size)
                else:
                    print(f"{name} on {size}: left; run the same again", flush=True)
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
    parser.add_argument("--types", nargs="*", default=[], help="of GGUF, beside these")
    parser.add_argument("--model", type=Path, help="this model instead of layers of R1's geometry")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32, help=f"of {QUALITY}")
    parser.add_argument("--few", type=int, default=8, help="samples of all others")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--cold", action="store_true", help="no warm-up")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no command is begun after so many")
    started, options = time.monotonic(), parser.parse_args()
    COMMANDS.update({f"gguf {name}": ["gguf", "--type", name] for name in options.types})
    bench = Bench(options)
    try:
        bench.all(started)
        print(f"\n{time.monotonic() - started:.0f} s in all")
    finally:
        for group in bench.groups.values():
            group.close()


if __name__ == "__main__":
    main()
