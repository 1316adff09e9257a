"""Runs dsquant's outputs in real engines and says how far these are from what `dsquant eval` reads.

    scripts/test-engines                                        # makes the environments, runs all, writes the table
    python -m benchmarks.engines.bench [--engine NAME]... [--family WORDS]...

Small models of each family (models.py) become every format that README's table claims for an engine; the engine, in an
environment of its own (make_environments), scores the same tokens as dsquant. Of each token's log-probability the mean
absolute difference from dsquant's reading is the engine's noise; beside it stands the noise of the same engine with the
BF16 model. Results go into engines_202611.json, whose other rows stay, and from there into docs/engines.md and README
(table.py).
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from math import exp
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.engines.models import (
    BASELINE,
    FAMILIES,
    IK,
    LLAMA_CPP,
    MLX,
    ROOT,
    TRANSFORMERS,
    VLLM,
    VLLM_GPU,
    Family,
    Output,
    outputs,
    tokens,
    without_mtp,
)
from benchmarks.engines.table import RESULTS, write_tables

ENVIRONMENTS = Path(os.environ.get("DSQUANT_ENGINES", "~/.cache/dsquant-engines")).expanduser()
FEW = {
    "preset": "compact", "steps": "scales,clip", "samples": 4, "seq_len": 128, "calibration": "code", "evaluate": False,
    "progress": False, "device": "cpu",
}  # fmt: skip

FORMATS_AT_ONCE = 6
MODELS_IN_A_LOT = 5


@dataclass(frozen=True)
class Engine:
    """An engine, its runner and the packages whose versions count."""

    runner: str
    packages: tuple[str, ...]
    environment: str = ""
    """Empty where it runs in dsquant's own."""
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def python(self) -> str:
        """The interpreter of its environment."""
        return str(ENVIRONMENTS / self.environment / "bin" / "python") if self.environment else sys.executable


OF_VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
}  # fmt: skip
OPTIONAL_OF_VLLM = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0"}  # packages that it can do without
ENGINES = {
    VLLM: Engine("run_vllm", ("vllm-cpu", "compressed-tensors"), "vllm", OF_VLLM),
    VLLM_GPU: Engine("run_vllm_gpu", ("vllm", "compressed-tensors"), "vllm-gpu", OF_VLLM | OPTIONAL_OF_VLLM),
    TRANSFORMERS: Engine("run_transformers", ("transformers", "compressed-tensors", "gptqmodel"), "transformers"),
    MLX: Engine("run_mlx_lm", ("mlx-lm", "mlx"), "mlx-lm"),
    LLAMA_CPP: Engine("run_llama_cpp", ("xllamacpp",)),
    IK: Engine("run_ik_llama_cpp", ("ik-llama-cpp-python",), "ik_llama.cpp"),
}


@dataclass(frozen=True)
class Row:
    """What one engine made of one output of one family."""

    engine: str
    family: str
    output: str
    reading: float
    """Perplexity, as dsquant reads the weights in float32 (GGUF with activations rounded)."""
    perplexity: float | None = None
    noise: float | None = None
    """Mean absolute difference of log-probabilities from dsquant's, in nats."""
    error: str = ""


def make(family: Family, folder: Path, wanted: Mapping[str, Output]) -> dict[str, Path]:
    """Makes a family's model and outputs, unless they are there: name -> what engines load."""
    import dsquant
    from dsquant.formats.gguf.gguf_weights import gguf_file

    model = folder / "model"
    if not (model / "config.json").exists():
        family.make(model)
    made = {family.baseline: model}
    jobs: dict[str, list[str]] = {}
    for name, output in wanted.items():
        key, count = repr(output.options), len(jobs)
        jobs.setdefault(key, []).append(name)
        if len(jobs[key]) == FORMATS_AT_ONCE:
            jobs[f"{key} {count}"] = jobs.pop(key)
    for names in jobs.values():
        target = folder / names[0].replace(" ", "-").replace(",", "").replace(":", "-")
        to, options = [wanted[name].to for name in names], FEW | wanted[names[0]].options
        if not target.exists():
            print(f"  {target.name}: {' '.join(to)}", flush=True)
            dsquant.awq(model, output=target, to=to, **options)
        for name, one in zip(names, to, strict=True):
            place = target if len(to) == 1 else target / one.replace(":", "-")
            made[name] = gguf_file(place) or place
            if family.loaded_as:
                config = place / "config.json"
                config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": family.loaded_as}))
    return made


def read(model: Path, made: Mapping[str, Path], samples: list[list[int]]) -> dict[str, list[float]]:
    """dsquant's own log-probabilities of every token but each sample's first: name -> one list."""
    from dsquant.evaluation.divergence import ComparedModels, compare
    from dsquant.evaluation.opening import open_candidate, open_original

    original = open_original(str(model))
    candidates = {name: open_candidate(str(path), original).weights for name, path in made.items()}
    models = ComparedModels(original.skeleton, original.checkpoint.weights, candidates)
    scores = compare(models, torch.tensor(samples), None)
    return {name: (-one.nll_candidate_NT).flatten().tolist() for name, one in scores.items()}


def versions(engine: Engine) -> dict[str, str]:
    """Package -> version in the engine's environment."""
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    found = subprocess.run([engine.python, "-c", code, *engine.packages], check=True, capture_output=True, text=True)
    return dict(zip(engine.packages, found.stdout.split(), strict=True))


def run(engine: Engine, models: Mapping[str, Path], samples: list[list[int]], log: Path) -> dict[str, dict]:
    """Name -> `log_probabilities` or `error` of each model; the engine is started again after an error."""
    left, found = dict(models), {}
    with tempfile.TemporaryDirectory() as scratch, log.open("a") as output:
        (Path(scratch) / "tokens.json").write_text(json.dumps(samples))
        while left:
            names = list(left)
            pairs = [f"{number}={left[name]}" for number, name in enumerate(names)]
            command = [engine.python, "-m", f"benchmarks.engines.{engine.runner}", f"{scratch}/tokens.json", scratch]
            environment = os.environ | engine.variables
            ended = subprocess.run([*command, *pairs], cwd=ROOT, env=environment, stdout=output, stderr=output)
            for number, name in enumerate(names):
                answer = Path(scratch) / f"{number}.json"
                if answer.exists():
                    found[name] = json.loads(answer.read_text())
                    answer.unlink()
                elif number == 0:
                    found[name] = {"error": f"the process ended with code {ended.returncode}"}
                else:
                    break
                del left[name]
    return found


def run_in_lots(engine: Engine, models: Mapping[str, Path], samples: list[list[int]], log: Path) -> dict[str, dict]:
    """As `run`, with an engine for each few models, beside one another."""
    pairs = list(models.items())
    lots = [dict(pairs[first : first + MODELS_IN_A_LOT]) for first in range(0, len(pairs), MODELS_IN_A_LOT)]
    with ThreadPoolExecutor(len(lots)) as pool:
        found = pool.map(lambda lot: run(engine, lot, samples, log), lots)
    return {name: answer for one in found for name, answer in one.items()}


def row(engine: str, family: str, output: str, reading: list[float], answer: dict) -> Row:
    """One row of the table."""
    own = exp(-fmean(reading))
    if "error" in answer:
        return Row(engine, family, output, own, error=answer["error"])
    found = [value for sample in answer["log_probabilities"] for value in sample]
    noise = fmean(abs(one - other) for one, other in zip(found, reading, strict=True))
    return Row(engine, family, output, own, exp(-fmean(found)), noise)


def bench(family: str, engines: list[str], work: Path, in_lots: bool) -> list[Row]:
    """Runs all outputs of one family in these engines."""
    print(family, flush=True)
    known, folder = FAMILIES[family], work / family.split(",")[0].replace(" ", "-").replace("(", "")
    wanted = {name: one for name, one in outputs(known).items() if {*one.engines} & {*engines}}
    if not wanted:
        return []
    made = make(known, folder, wanted)
    plain = made[known.baseline]
    samples = tokens(plain).tolist()
    readings = read(plain, made, samples)
    rows = []
    for engine in engines:
        mine = {name: made[name] for name, one in wanted.items() if engine in one.engines}
        if mine and runs_itself(known, engine):
            mine = {known.baseline: without_mtp(plain, folder / "without-mtp") if engine == MLX else plain} | mine
        answers = (run_in_lots if in_lots else run)(ENGINES[engine], mine, samples, folder / f"{engine}.log")
        rows += [row(engine, family, name, readings[name], answer) for name, answer in answers.items()]
        print(
            f"  {engine}: {sum(not one.error for one in rows if one.engine == engine)} of {len(mine)} run", flush=True
        )
    return rows


def runs_itself(family: Family, engine: str) -> bool:
    """Whether an engine takes a family's own checkpoint: no GGUF engine does, FP8 blocks want a GPU, and engines know
    Kimi's release in 4 bits as another class."""
    if engine in (LLAMA_CPP, IK) or family.loaded_as:
        return False
    return family.baseline == BASELINE or engine == VLLM_GPU


def main() -> None:
    """Parses the command line, runs, and writes the tables anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=list(ENGINES))
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    parser.add_argument("--work", type=Path, help="keeps models and outputs, and takes those that are there")
    parser.add_argument("--at-once", type=int, default=1, help="families that are run beside one another, in lots")
    arguments = parser.parse_args()
    engines = arguments.engine or [name for name in ENGINES if name != VLLM_GPU or torch.cuda.is_available()]
    found = {name: versions(ENGINES[name]) for name in engines}
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(arguments.at_once, multiprocessing.get_context("spawn")) as pool,
    ):
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        one = partial(bench, engines=engines, work=work, in_lots=arguments.at_once > 1)
        for rows in pool.map(one, arguments.family or FAMILIES):
            keep(rows, found)
    write_tables()


def keep(rows: list[Row], found: dict[str, dict[str, str]]) -> None:
    """Puts rows into the results, in place of older ones of the same engine and family."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"versions": {}, "rows": []}
    anew = {(one.engine, one.family) for one in rows}
    others = [one for one in results["rows"] if (one["engine"], one["family"]) not in anew]
    order = [(engine, family) for engine in ENGINES for family in FAMILIES]
    merged = sorted(others + [asdict(one) for one in rows], key=lambda one: order.index((one["engine"], one["family"])))
    RESULTS.write_text(json.dumps({"versions": results["versions"] | found, "rows": merged}, indent=1) + "\n")


if __name__ == "__main__":
    main()
