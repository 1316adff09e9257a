"""Mixture layers of R1's own geometry through `dsquant awq --device cuda`: seconds for each stage, bytes, memory.

    python -m benchmarks.r1_layer --folder /tmp/r1-layer [--experts 256] [--samples 128] [--layers 2]

makes layers on disk (FP8, hidden 7168, 256 experts of 2048, one dense part), runs the real pipeline on them as a user
would, and prints what the clock, the kernel and PyTorch say. The first layer of a job reads its hidden states from a
file, the last waits until its own are in one; those between do neither. The disk's own seconds are the bytes that the
kernel counted over the rates measured in the same run. `--stages` waits for the GPU at the border of every stage: its
sum is larger than the plain run's time, where stages overlap. Weights are random: this measures time and memory.
"""

import argparse
import json
import os
import resource
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import dsquant
from benchmarks.peers.autoawq_search import search_seconds
from benchmarks.r1_width import make_checkpoint

GIB = 2**30
LAYERS, MIXTURES = 61, 58


def stage_timers(seconds: dict[str, float]) -> None:
    """Makes each stage of the pipeline add its time to `seconds`; the GPU is waited for at its borders."""
    from dsquant.formats.safetensors_writer import ShardWriter
    from dsquant.model.activations import Activations
    from dsquant.model.gated import GatedWeights
    from dsquant.pipeline import writers
    from dsquant.quantization import layer, layer_mlps

    stages: list[tuple[str, Any, str]] = [
        ("attention, router, shared statistics", layer, "run_original"),
        ("search of the norm's scales", layer, "search_norm_fold"),
        ("proof of the fold", layer, "emit_dense_part"),
        ("what compensates gate and up", layer_mlps, "shared_inverses"),
        ("reading experts", GatedWeights, "read"),
        ("experts' forward", layer_mlps, "add_contributions"),
        ("experts' statistics", layer_mlps, "moments_of"),
        ("search, clip, rounding", layer_mlps, "quantize_mlp"),
        ("packing, handing to the writer", ShardWriter, "write"),
        ("end of the unit: rest, fsync", writers.Writers, "finish"),
        ("hidden states to disk", Activations, "save"),
    ]
    for name, owner, attribute in stages:
        setattr(owner, attribute, timed(getattr(owner, attribute), name, seconds))


def timed(function: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """The function, with its time added to `seconds[name]`."""

    @wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        torch.cuda.synchronize()
        started = time.monotonic()
        result = function(*arguments, **named)
        torch.cuda.synchronize()
        seconds[name] += time.monotonic() - started
        return result

    return run


def disk_rates(folder: Path, model: Path, blocks: int = 16) -> tuple[float, float]:
    """Bytes a second of reading a shard of a model that no cache holds, and of writing blocks of 64 MiB and syncing."""
    path = next(iter(sorted(model.glob("*.safetensors"))))
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started, done = time.monotonic(), 0
        buffer = bytearray(64 * 2**20)
        while count := file.readinto(buffer):
            done += count
        read = done / (time.monotonic() - started)
    started = time.monotonic()
    with (folder / "probe").open("wb") as file:
        for _ in range(blocks):
            file.write(buffer)
        file.flush()
        os.fsync(file.fileno())
    written = blocks * len(buffer) / (time.monotonic() - started)
    (folder / "probe").unlink()
    return read, written


def disk_bytes() -> tuple[int, int]:
    """Bytes that this process has made the disk read and will have made it write, as the kernel counts them."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"]), int(counts["write_bytes"])


def matmul_rates() -> dict[str, float]:
    """Operations a second of an 8192-wide matrix product, by precision."""
    rates = {}
    for name, dtype, precision in (("bf16", torch.bfloat16, "highest"), ("tf32", torch.float32, "high")):
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        for _ in range(3):
            a @ b
        torch.cuda.synchronize()
        started = time.monotonic()
        for _ in range(10):
            a @ b
        torch.cuda.synchronize()
        rates[name] = 10 * 2 * 8192**3 / (time.monotonic() - started)
    torch.set_float32_matmul_precision("highest")
    del a, b
    torch.cuda.empty_cache()
    return rates


def run(options: argparse.Namespace, samples: int) -> dict[str, Any]:
    """One run of the pipeline; what it took."""
    tokens = torch.randint(3, 1000, (samples, options.seq_len), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, options.folder / "tokens.safetensors")
    output = options.folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    marks: list[tuple[float, str, tuple[int, int]]] = []
    seconds: dict[str, float] = defaultdict(float)
    if options.stages:
        stage_timers(seconds)
    torch.cuda.reset_peak_memory_stats()
    from dsquant.options import parse_size
    from dsquant.pipeline import job as pipeline
    from dsquant.recipes import Recipe

    recipe = Recipe.checked(
        model=str(options.folder / "model"),
        output=output,
        preset=options.preset,
        to=(options.to,),
        calibration=(str(options.folder / "tokens.safetensors"),),
        samples=samples,
        seq_len=options.seq_len,
        device="cuda",
        memory_budget=parse_size(options.memory_budget),
        gpu_memory_budget=parse_size(options.gpu_memory_budget),
        evaluate=False,
    )
    result = pipeline.run_job(
        recipe, report=lambda step: marks.append((time.monotonic(), f"{step.stage} {step.done}", disk_bytes()))
    )
    first = {what: (moment, done) for moment, what, done in reversed(marks)}
    moments, counts = zip(*(first[f"quantize {number}"] for number in range(1, options.layers + 2)), strict=True)
    read, written = ((counts[-1][place] - counts[0][place]) / options.layers for place in (0, 1))
    return {
        "tokens": samples * options.seq_len,
        "layers_s": [ended - begun for begun, ended in pairwise(moments)],
        "disk_read_gib": read / GIB,
        "disk_written_gib": written / GIB,
        "begin_s": first["quantize 0"][0] - marks[0][0],
        "all_s": result.elapsed_s,
        "gpu_gib": result.peak_gpu_bytes / GIB,
        "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "stages": dict(seconds),
    }


def main() -> None:
    """Makes the layer where it is not there, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--samples", type=int, nargs="+", default=[128])
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--preset", default="quality")
    parser.add_argument("--to", default="awq")
    parser.add_argument("--memory-budget", default="24GiB")
    parser.add_argument("--gpu-memory-budget", default="16GiB")
    parser.add_argument("--stages", action="store_true", help="wait between stages, print the time of each")
    parser.add_argument("--peer-experts", type=int, default=0, help="experts to run AutoAWQ's search on, in this run")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "model").exists():
        started = time.monotonic()
        make_checkpoint(options.folder / "model", options.experts, options.layers, device="cuda")
        print(f"made the layers in {time.monotonic() - started:.0f} s")
    torch.cuda.empty_cache()
    read, written = disk_rates(options.folder, options.folder / "model")
    rates = matmul_rates()
    print(f"{torch.cuda.get_device_name()}, dsquant {dsquant.__version__}, torch {torch.__version__}")
    print(f"disk: {read / 1e9:.2f} GB/s read, {written / 1e9:.2f} GB/s written and synced")
    print("matrix products: " + ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in rates.items()))
    found = []
    print("| tokens | seconds of each layer | the disk's for one | GiB read / written | begin | GPU GiB | host GiB |")
    print("|---|---|---|---|---|---|---|")
    for samples in options.samples:
        row = run(options, samples)
        found.append(row)
        row["disk_s"] = (row["disk_read_gib"] / read + row["disk_written_gib"] / written) * GIB
        print(
            f"| {row['tokens']} | {', '.join(f'{found:.1f}' for found in row['layers_s'])} | {row['disk_s']:.1f} | "
            f"{row['disk_read_gib']:.2f} / {row['disk_written_gib']:.2f} | {row['begin_s']:.1f} | "
            f"{row['gpu_gib']:.2f} | {row['host_gib']:.2f} |"
        )
        for name, seconds in row["stages"].items():
            print(f"    {name:40} {seconds:7.2f} s")
    last = sum(found[-1]["layers_s"]) / options.layers
    if options.peer_experts:
        rows = found[-1]["tokens"] * 8 // options.experts
        peer = search_seconds(options.peer_experts, rows)
        whole = sum(peer.values()) * (options.experts + 1) / options.peer_experts
        print(f"AutoAWQ's own searches on {options.peer_experts} such experts with {rows} tokens each (float16):")
        print("    " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in peer.items()))
        print(
            f"    scaled to {options.experts + 1} MLPs: {whole:.0f} s, {whole / last:.0f} times dsquant's whole layer"
        )
    print(f"{MIXTURES} such layers: {MIXTURES * last / 60:.1f} min; the 3 dense layers and the head are not in this")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
