"""Two mixture layers of R1's geometry on one GPU and on several: seconds of the second; the bytes have to be equal.

    python -m benchmarks.r1_ranks --folder /tmp/r1-ranks --ranks 1 1 2 4 [--experts 256] [--samples 128]

makes the layers on disk (FP8), runs `dsquant awq` on them through torchrun with each number of ranks, and compares all
files with the first run's. A layer's seconds lie between its line in the journal and the one before; those of the first
contain what happens once in a run, such as joining the ranks, and once on a machine, such as compiling kernels.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.r1_width import make_checkpoint


def run(options: argparse.Namespace, ranks: int) -> tuple[float, float, float]:
    """One run; the seconds of the layers and of all."""
    output = options.folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, "-m", "dsquant.cli", "awq", str(options.folder / "model"), "--output", str(output)]
    command += ["--preset", options.preset, "--to", options.to, "--device", options.device, "--no-evaluate", "--json"]
    command += ["--calibration", str(options.folder / "tokens.safetensors")]
    command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    journal, moments = output / ".dsquant-work" / "journal.jsonl", list[float]()
    while process.poll() is None:
        lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
        moments += [time.monotonic()] * (lines - len(moments))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    embedding, first, second = moments[:3]
    return first - embedding, second - first, time.monotonic() - started


def main() -> None:
    """Makes the layers where they are not there, runs, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", required=True)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--preset", default="quality")
    parser.add_argument("--to", default="awq")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    model = options.folder / "model"
    if not model.exists():
        make_checkpoint(model, options.experts, layers=2, device=options.device)
    tokens = torch.randint(3, 1000, (options.samples, options.seq_len), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, options.folder / "tokens.safetensors")
    first: dict[str, str] = {}
    print("| ranks | seconds of the first layer | of the second | of the whole run | files |")
    print("|---|---|---|---|---|", flush=True)
    for ranks in options.ranks:
        seconds = " | ".join(f"{part:.1f}" for part in run(options, ranks))
        files = sorted((options.folder / "out").iterdir())
        hashes = {path.name: hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in files}
        first = first or hashes
        different = [name for name in first | hashes if first.get(name) != hashes.get(name)]
        outcome = f"{len(hashes)}, " + (f"DIFFERENT: {', '.join(different)}" if different else "the same bytes")
        print(f"| {ranks} | {seconds} | {outcome} |", flush=True)


if __name__ == "__main__":
    main()
