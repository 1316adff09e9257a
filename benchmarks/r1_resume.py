"""Four layers of R1 geometry on a GPU: quantized whole, and again with a kill in between; the bytes have to be equal.

    python -m benchmarks.r1_resume --folder /tmp/r1-four [--experts 64]

makes two dense layers and two mixtures on disk (FP8), runs `dsquant awq --device cuda` on them twice, kills the second
run with SIGKILL once its third unit is journaled, resumes it, and compares every file.
"""

import argparse
import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.r1_width import make_checkpoint

KILL_AFTER_UNITS = 3


def main() -> None:
    """Makes the layers where they are not there, runs, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    model = options.folder / "model"
    if not model.exists():
        make_checkpoint(model, options.experts, layers=4, dense=2, device=options.device)
    common = ["awq", str(model), "--no-evaluate", "--resume", "--json", "--device", options.device]
    common += ["--calibration", "code", "--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    whole, killed = (
        [sys.executable, "-c", "from dsquant.cli import main; main()", *common, "--output", str(options.folder / name)]
        for name in ("whole", "killed")
    )
    started = time.monotonic()
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)
    print(f"uninterrupted: {time.monotonic() - started:.0f} s")
    victim = subprocess.Popen(killed, stdout=subprocess.DEVNULL)
    journal = options.folder / "killed" / ".dsquant-work" / "journal.jsonl"
    while victim.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < KILL_AFTER_UNITS):
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    print(f"killed with {len(journal.read_bytes().splitlines())} units journaled")
    subprocess.run(killed, check=True, stdout=subprocess.DEVNULL)
    hashes = [
        {path.name: hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in sorted(folder.iterdir())}
        for folder in (options.folder / "whole", options.folder / "killed")
    ]
    same = hashes[0] == hashes[1]
    print(f"{len(hashes[0])} files, {'identical' if same else 'DIFFERENT'} after the kill and the resume")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
