"""What a GPU and the host do while R1's experts are quantized: kernels, launches, and where the main thread is.

    python -m benchmarks.r1_kernels --folder /dev/shm/r1-kernels [--preset best] [--samples 16] [--to awq]
    python -m benchmarks.r1_kernels --folder /tmp/small --model dsquant/assets/tiny-r1 --device cpu --samples 2 \\
        --seq-len 128 --skip 2 --measured 3

makes one mixture of R1's width with 32 experts, of which each gets as many of 16 x 2048 tokens as one of R1's 256 gets
of 262,144, and runs `dsquant awq` on it. Behind the experts that warm up, some pass by the clock alone, as many under
PyTorch's profiler, and as many while the main thread's stack is sampled; the GPU is waited for between these. Where
the kernels' sum is far below the clock's time, the host is what limits, and the samples say where.
"""

import argparse
import re
import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.r1_width import make_checkpoint
from dsquant.reporting.progress import Progress

EXPERT = re.compile(r"\.experts\.\d+$")
SAMPLED_S = 0.002
FRAMES = 3
KERNELS, PLACES = 30, 40
NAME_CHARACTERS = 120


class Samples:
    """Where a thread is, again and again."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._thread, self._over = threading.main_thread().ident, threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def begin(self) -> None:
        self._sampler.start()

    def end(self) -> None:
        self._over.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLED_S):
            self.places[place(sys._current_frames()[self._thread])] += 1  # type: ignore[index]


def place(frame: FrameType | None) -> str:
    """The innermost frames of dsquant, below them the one of a library that they wait for."""
    found: list[str] = []
    while frame is not None and len(found) < FRAMES:
        path = Path(frame.f_code.co_filename)
        own = "dsquant" in path.parts
        if own or not found:
            name = "/".join(path.parts[-2:]) if own else path.name
            found.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found)


class Windows:
    """Experts by number: the clock's, the profiler's, the samples'."""

    def __init__(self, skip: int, measured: int, device: str) -> None:
        self._edges = [skip + part * measured for part in range(4)]
        self._measured, self._cuda = measured, device == "cuda"
        self._seen, self._moments = 0, list[float]()
        kind = torch.profiler.ProfilerActivity
        self.profile = torch.profiler.profile(activities=[kind.CUDA if self._cuda else kind.CPU])
        self.samples = Samples()

    def report(self, step: Progress) -> None:
        """Takes note of a step, which may be another expert's."""
        if not EXPERT.search(step.what):
            return
        if self._seen in self._edges:
            self._cross(self._edges.index(self._seen))
        self._seen += 1

    def _cross(self, edge: int) -> None:
        begin = (lambda: None, self.profile.__enter__, self.samples.begin, lambda: None)[edge]
        end = (lambda: None, lambda: None, lambda: self.profile.__exit__(None, None, None), self.samples.end)[edge]
        if self._cuda:
            torch.cuda.synchronize()
        self._moments.append(time.monotonic())
        end()
        begin()
        self._moments.append(time.monotonic())

    def told(self) -> str:
        """All that was found."""
        if len(self._moments) < 2 * len(self._edges):
            return f"only {self._seen} experts, {self._edges[-1] + 1} are needed"
        spans = [self._moments[2 * part + 2] - self._moments[2 * part + 1] for part in range(3)]
        seconds = ", ".join(
            f"{name} {span / self._measured * 1e3:.1f}" for name, span in zip(NAMES, spans, strict=True)
        )
        return "\n\n".join((f"{self._measured} experts each, ms an expert: {seconds}", self._kernels(), self._places()))

    def _kernels(self) -> str:
        events = self.profile.events() or []
        wanted = torch.autograd.DeviceType.CUDA if self._cuda else torch.autograd.DeviceType.CPU
        spent, counts = Counter[str](), Counter[str]()
        for event in events:
            if event.device_type == wanted:
                spent[event.name] += event.time_range.elapsed_us() if self._cuda else event.self_cpu_time_total
                counts[event.name] += 1
        total, per = sum(spent.values()) / 1e3 / self._measured, self._measured
        lines = [f"{total:.1f} ms an expert in {sum(counts.values()) / per:.0f} kernels and copies:", ""]
        for name, micros in spent.most_common(KERNELS):
            lines.append(f"{micros / 1e3 / per:9.2f} ms {counts[name] / per:7.1f} x {name[:NAME_CHARACTERS]}")
        return "\n".join(lines)

    def _places(self) -> str:
        places, per = self.samples.places, self._measured
        each = (self._moments[6] - self._moments[5]) / max(1, sum(places.values())) / per * 1e3
        lines = ["the main thread:", ""]
        return "\n".join(lines + [f"{count * each:9.2f} ms {where}" for where, count in places.most_common(PLACES)])


NAMES = ("by the clock", "under the profiler", "sampled")


def run(options: argparse.Namespace, windows: Windows) -> None:
    """One run of the pipeline."""
    from dsquant.options import parse_size
    from dsquant.pipeline import job as pipeline
    from dsquant.recipes import Recipe

    model = options.model or options.folder / "model"
    if not model.exists():
        make_checkpoint(model, options.experts, device=options.device)
    tokens = torch.randint(3, 1000, (options.samples, options.seq_len), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, options.folder / "tokens.safetensors")
    shutil.rmtree(options.folder / "out", ignore_errors=True)
    settings: dict[str, Any] = {
        "model": str(model),
        "output": options.folder / "out",
        "preset": options.preset,
        "to": (options.to,),
        "calibration": (str(options.folder / "tokens.safetensors"),),
        "samples": options.samples,
        "seq_len": options.seq_len,
        "device": options.device,
        "memory_budget": parse_size("24GiB"),
        "evaluate": False,
    }
    pipeline.run_job(Recipe.checked(**settings), report=windows.report)


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="this model instead of a layer of R1's width")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--preset", default="quality")
    parser.add_argument("--to", default="awq")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--skip", type=int, default=8, help="experts that warm up")
    parser.add_argument("--measured", type=int, default=7, help="experts of each kind")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    windows = Windows(options.skip, options.measured, options.device)
    run(options, windows)
    print(windows.told())


if __name__ == "__main__":
    main()
