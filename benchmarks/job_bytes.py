"""Runs about two dozen small jobs through the command line and keeps what they wrote: the guard of a redesign.

    python -m benchmarks.job_bytes before.json                        # at the commit to keep
    python -m benchmarks.job_bytes after.json --compare before.json   # after the change: prints what differs, exit 1

One thread, fixed seeds. Of every file a SHA-256 is kept; of a record (dsquant.json) one for every key, so that records
may gain keys; of a patch one for every member, since a zip file carries the time of day. Tables are of one machine and
one set of packages: others round differently.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.checkpoints import (
    FP8,
    LLAMA,
    PICO_R1,
    QWEN2,
    QWEN3,
    add_tokenizer,
    make_dense,
    put_outliers_into_norms,
    r1_shapes,
    random_weights,
    save_checkpoint,
    stored,
)

ROOT = Path(__file__).parent.parent
SMALL = "--samples 4 --seq-len 128"
FEW = f"{SMALL} --no-evaluate"
EVERY = "--preset compact --kv-b quantize"  # what this preset took before there was the option
THREE = "--to awq --to compressed-tensors --rest bf16 --to gguf:Q4_K_M"
FLOATS = "--to nvfp4 --to mxfp4 --to nvfp4-modelopt"
ALL_STEPS = "scales,clip,compensate,top-up,gate-weights,follow,descend"
# What an FP8 model became, before it became compressed-tensors with its own blocks, is named.
# Name -> the command behind `dsquant`, whose output is NAME/out. Later ones may read what earlier ones wrote.
JOBS = {
    "quality": f"awq tiny-r1 {SMALL} --to awq",
    "compact": f"awq tiny-r1 {FEW} {EVERY} --mtp quantize --to awq",
    "best": f"awq tiny-r1 {FEW} --preset best --kv-b quantize --mtp drop --to awq",
    "steps-none": f"awq mixture {FEW} --group-size 64 {EVERY} --steps none --to awq",
    "steps-scales": f"awq mixture {FEW} --group-size 64 {EVERY} --steps scales --to awq",
    "steps-clip": f"awq mixture {FEW} --group-size 64 {EVERY} --steps clip --to awq",
    "steps-compensate": f"awq mixture {FEW} --group-size 64 {EVERY} --steps compensate --to awq",
    "steps-descend": f"awq mixture {FEW} --group-size 64 {EVERY} --steps compensate,descend --to awq",
    "steps-all": f"awq mixture {FEW} --group-size 64 {EVERY} --steps {ALL_STEPS} --to awq",
    "awq-symmetric": f"awq mixture {FEW} --group-size 64 {EVERY} --symmetric --to awq",
    "ct-symmetric": f"awq mixture {FEW} --group-size 64 --to compressed-tensors --rest bf16 --symmetric --bits 8",
    "ct-asymmetric": f"awq llama {FEW} --to compressed-tensors --asymmetric",
    "formats": f"awq mixture {FEW} --group-size 64 {EVERY} {THREE}",
    "fp8-rest": f"awq mixture {FEW} --group-size 64 --preset compact",
    "Q4_K_M": f"gguf tiny-r1 {SMALL}",
    "Q4_K_M+": f"gguf tiny-r1 {FEW} --type Q4_K_M+ --mtp keep",
    "IQ4_XS": f"gguf mixture {FEW} --type IQ4_XS",
    "Q2_K-split": "gguf tiny-r1 --no-evaluate --type Q2_K --calibration none --split-max-size 1MiB",
    "widths": f"awq mixture {FEW} --group-size 64 {EVERY} --target-bits 5 --to awq",
    "types": f"gguf tiny-r1 {FEW} --target-bits 4.5",
    "dense-llama": f"awq llama {FEW} --max-shard-size 1MiB",
    "dense-qwen2": f"gguf qwen2 {FEW} --type Q5_K_M",
    "dense-qwen3": f"awq qwen3 {FEW} --preset best --to compressed-tensors --asymmetric",
    "nvfp4": f"awq mixture {FEW} --preset compact --rest bf16 --mtp quantize {FLOATS}",
    "nvfp4-best": f"awq mixture {FEW} --preset best --to nvfp4",
    "delta": "delta mixture mixture-2 --quantized steps-scales/out --patch delta/patch",
    "applied": "delta --apply delta/patch steps-scales/out",
    "killed": f"awq mixture {FEW} --group-size 64 {EVERY} {THREE}",
    "two-ranks": f"awq mixture {FEW} --group-size 64 {EVERY} --symmetric --to awq",
}
SAME = {"killed": "formats", "two-ranks": "awq-symmetric", "applied": "delta"}
"""Jobs that write what another one writes."""
DERIVED_KEYS = ("sections_sha256", "recipe_sha256", "versions", "record_version")
"""Keys of a record that change with keys that it gains, or with packages."""


def main() -> int:
    """Runs the jobs, writes the table, and compares it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="table to write")
    parser.add_argument("--compare", type=Path, metavar="TABLE", help="table of an earlier commit")
    parser.add_argument("--only", default="", metavar="REGEX", help="jobs whose names match")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bytes-of-jobs-"))
    try:
        _make_models(work)
        table = {}
        for name in JOBS:
            if re.search(arguments.only, name):
                before = _cpu_seconds()
                _run(name, work)
                table[name] = dict(_contents(work / name))
                arguments.table.write_text(json.dumps(table, indent=1) + "\n")
                print(f"{name:17} {_cpu_seconds() - before:6.1f} CPU seconds", flush=True)
    finally:
        shutil.rmtree(work)
    print(f"{'all':17} {_cpu_seconds():6.1f} CPU seconds")
    differences = list(_unlike_their_twins(table))
    if arguments.compare:
        earlier = json.loads(arguments.compare.read_text())
        differences += _differences({name: earlier[name] for name in earlier if re.search(arguments.only, name)}, table)
    print("\n".join(differences or ["nothing differs"]))
    return bool(differences)


def _make_models(work: Path) -> None:
    config = {**PICO_R1, "num_hidden_layers": 3, "quantization_config": FP8}
    weights = random_weights(r1_shapes(config))
    put_outliers_into_norms(config, weights)
    for folder in ("mixture", "mixture-2"):
        add_tokenizer(save_checkpoint(work / folder, config, stored(weights, fp8=True)))
        for changed in ("self_attn.o_proj", "mlp.experts.3.up_proj"):
            weights[f"model.layers.1.{changed}.weight"] *= 1.125
    for name, dense in (("llama", LLAMA), ("qwen2", QWEN2), ("qwen3", QWEN3)):
        add_tokenizer(make_dense(work / name, {**dense, "vocab_size": 320}))  # Qwen2's tokenizer adds one of its own


def _run(name: str, work: Path) -> None:
    command = [sys.executable, "-m", "dsquant.cli", *JOBS[name].split(), "--output", f"{name}/out", "--json"]
    (work / name).mkdir()
    if name == "killed":
        process = _start(command, work)
        journal = work / name / "out" / ".dsquant-work" / "journal.jsonl"
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None, "the job ended before it could be killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        command.append("--resume")
    size = 2 if name == "two-ranks" else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    ranks = [_start(command, work, **shared, RANK=rank, LOCAL_RANK=rank) for rank in range(size)]
    if any([process.wait() for process in ranks]):
        raise SystemExit(f"{name}: {' '.join(command)} failed:\n{(work / 'errors').read_text()}")


def _start(command: list[str], work: Path, **environment: object) -> subprocess.Popen[bytes]:
    named = {name: str(value) for name, value in environment.items()}
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (work / "errors").open("wb") as errors:
        return subprocess.Popen(
            command, cwd=work, env={**os.environ, **own, **named}, stdout=subprocess.DEVNULL, stderr=errors
        )


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _contents(folder: Path) -> Iterator[tuple[str, Any]]:
    """File -> its SHA-256, or those of its parts."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name == "dsquant.json":
            yield name, _keys(json.loads(path.read_text()))
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = sorted(archive.namelist())
                yield name, {member: _digest(archive.read(member)) for member in members}
        else:
            yield name, _digest(path.read_bytes())


def _keys(record: dict[str, Any]) -> dict[str, str]:
    """A record's keys, names of tensors and places in lists left out, with a digest of all values below each."""
    values: dict[str, list[Any]] = {}

    def collect(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for part, inner in sorted(value.items()):
                named = "*" if re.search(r"[.\d/]", part) else part
                collect([part, inner] if named == "*" else inner, f"{key}.{named}")
        elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
            for inner in value:
                collect(inner, key)
        else:
            values.setdefault(key.removeprefix("."), []).append(value)

    collect({key: value for key, value in record.items() if key not in DERIVED_KEYS}, "")
    return {key: _digest(json.dumps(found).encode()) for key, found in values.items()}


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def _unlike_their_twins(table: dict[str, Any]) -> Iterator[str]:
    for name, other in SAME.items():
        if name in table and other in table:
            wanted = {file: found for file, found in table[other].items() if not file.startswith("patch")}
            yield from (f"{line} (as {other})" for line in _differences({name: wanted}, table))


def _differences(before: dict[str, Any], now: dict[str, Any], where: str = "") -> Iterator[str]:
    """Keys that are missing or have another value; new ones are no difference in a record, but are among files."""
    for key in sorted(before):
        place = f"{where}: {key}" if where else key
        if key not in now:
            yield f"{place} is missing"
        elif isinstance(before[key], dict) and isinstance(now[key], dict):
            yield from _differences(before[key], now[key], place)
        elif before[key] != now[key]:
            yield f"{place} differs"
    if where and not where.endswith("dsquant.json"):
        yield from (f"{where}: {key} is new" for key in sorted(now.keys() - before.keys()))


if __name__ == "__main__":
    sys.exit(main())
