"""4-bit quantizers side by side: the same models, the same calibration tokens, one independent evaluator.

    python -m benchmarks.quality MODEL [MODEL]... --text FILE --wiki FILE --work DIR --peers DIR \\
        [--seeds 0 1 2] [--methods NAME...] [--jobs 2] [--device cuda] [--evaluator cuda] [--write FILE]

MODEL is a folder with a DeepSeek-V3, V3.2 or Llama checkpoint, FP8 or not, that fits in memory. Calibration takes 64
windows of 256 tokens from the first half of the text, other ones for each seed; evaluation 32 windows of 512 from its
second half, and as many from the other text. Each method quantizes every linear of the decoder but router and indexer,
in groups of 128 (`--group-size 64` for rows that 128 does not divide); only GGUF files have their own types. The
figures come from `benchmarks/peers/reference.py`, which shares no code with dsquant. Run it from the repository's root;
`benchmarks/peers/make_environments DIR` makes the peers' environments.

What is finished in DIR is not done again: the same command again goes on where it was stopped, and more seeds, methods
or models only add to it; `--only-report` shows what there is. dsquant's results hold for its source files as they are.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from pathlib import Path
from threading import Lock

from benchmarks.peers.decoding import stored_bits
from benchmarks.peers.reference import Divergence, Evaluator
from benchmarks.peers.tokens import chosen_windows, halves, read_tokens, spaced_windows, tokens_of, write_tokens
from benchmarks.quality_methods import GGUF, Method, chosen_methods

CALIBRATION_SHAPE = (64, 256)
EVALUATION_SHAPE = (32, 512)
GROUP_SIZE = 128
ROOT = Path(__file__).resolve().parent.parent
VERSIONS = {
    "autoawq": ["autoawq", "transformers", "torch"],
    "llmcompressor": ["llmcompressor", "compressed-tensors", "transformers", "torch"],
    "gptqmodel": ["gptqmodel", "transformers", "torch"],
    "autoround": ["auto-round", "transformers", "torch"],
    "llamacpp": ["llama_cpp_python", "transformers", "torch"],
    "modelopt": ["nvidia-modelopt", "transformers", "torch"],
}
"""Environment of a peer -> packages whose versions are told; llama.cpp is the one in llama-cpp-python's source."""
WITH_DEVICE = (None, "autoround")
"""Environments of the methods that take `--device`; the others compute on a CPU."""


def as_gguf_folder(model: Path, output: Path) -> None:
    """Makes dsquant's GGUF output what the evaluator reads: the model's .gguf alone, with a config.json."""
    (output / "imatrix.gguf").unlink()
    config = read_json(model / "config.json") | {"quantization_config": {"quant_method": "gguf"}}
    (output / "config.json").write_text(json.dumps(config, indent=2))


def command_of(method: Method, model: Path, work: Path, seed_work: Path, arguments: argparse.Namespace) -> list[str]:
    """How a method is run."""
    tokens, output = str(seed_work / "calibration.safetensors"), str(seed_work / method.name)
    groups = [] if arguments.group_size == GROUP_SIZE else ["--group-size", str(arguments.group_size)]
    if arguments.device and method.environment in WITH_DEVICE:
        groups += ["--device", arguments.device]
    if method.environment is None:
        common = ["--calibration", tokens, *groups, *arguments.dsquant_option]
        dsquant = [arguments.dsquant] if arguments.dsquant else [sys.executable, "-m", "dsquant.cli"]
        return [*dsquant, *method.options, *common, "--output", output, str(model)]
    python = str(arguments.peers.resolve() / method.environment / "bin" / "python")
    module = f"benchmarks.peers.{method.environment}"
    return [python, "-m", module, str(work / "float32"), tokens, output, *groups, *method.options]


def run_logged(command: list[str], log: Path, threads: int) -> float:
    """Runs a command from the repository's root and sends what it prints to a file.

    Returns:
        Seconds that the processors worked for it: on a shared machine the clock tells little.

    Raises:
        RuntimeError: it failed; holds the end of the log.
    """
    own = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "GPTQMODEL_CPU_WORKERS": "2"}
    with (
        log.open("w") as stream,
        subprocess.Popen(command, cwd=ROOT, env=os.environ | own, stdout=stream, stderr=stream) as process,
    ):
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
    if code != 0:
        end = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)}: exit code {code}, log in {log}, which ends:\n{end}")
    return used.ru_utime + used.ru_stime


def hash_of(*parts: str | bytes | Path) -> str:
    """SHA-256 of texts, bytes and files' contents."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


@cache
def hash_of_dsquant() -> str:
    """SHA-256 of dsquant's source files."""
    return hash_of(*sorted((ROOT / "dsquant").rglob("*.py")))


def read_json(path: Path) -> dict:
    """A JSON file's object, empty if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, values: dict) -> None:
    """Writes a JSON file; whoever reads meanwhile finds it whole or as it was."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(values, indent=2))
    partial.replace(path)


class Bench:
    """One model's work folder: its tokens, its checkpoints by seed and method, the figures."""

    def __init__(self, model: Path, arguments: argparse.Namespace) -> None:
        """Writes tokens and the full-precision checkpoint, unless they are there."""
        self.model, self.arguments = model, arguments
        self.work = arguments.work.resolve() / model.name
        self.work.mkdir(parents=True, exist_ok=True)
        self.model_hash = hash_of(*sorted(model.glob("*.safetensors")))
        calibration_text, evaluation_text = halves(arguments.text)
        texts = {"code": evaluation_text}
        if arguments.wiki:
            texts["wiki"] = arguments.wiki.read_text(encoding="utf-8")
        for name, text in texts.items():
            write_tokens(spaced_windows(tokens_of(model, text), *arguments.evaluation), self._evaluation(name))
        self.texts = list(texts)
        tokens = tokens_of(model, calibration_text)
        for seed in arguments.seeds:
            path = self.work / f"seed-{seed}" / "calibration.safetensors"
            write_tokens(chosen_windows(tokens, *arguments.calibration, seed), path)
        self._convert()
        self._evaluator: Evaluator | None = None
        self._evaluating = Lock()

    def _evaluation(self, text: str) -> Path:
        return self.work / f"evaluation-{text}.safetensors"

    def _convert(self) -> None:
        """The checkpoint that the peers read."""
        target, made = self.work / "float32", self.work / "float32.made"
        if made.exists() and made.read_text() == self.model_hash:
            return
        command = [sys.executable, "-m", "benchmarks.peers.to_bf16", str(self.model), str(target), "--dtype", "float32"]
        run_logged(command, self.work / "float32.log", self.arguments.threads)
        made.write_text(self.model_hash)

    def _measured(self, measure: Callable[[Evaluator], dict[str, Divergence]]) -> dict:
        """Figures and what they hold for; one at a time. The original runs when the first are asked for."""
        with self._evaluating:
            if self._evaluator is None:
                tokens = {name: read_tokens(self._evaluation(name)) for name in self.texts}
                self._evaluator = Evaluator(self.model, tokens, self.arguments.evaluator)
            return {"measured": self.evaluation_hash(), "texts": as_json(measure(self._evaluator))}

    def evaluation_hash(self) -> str:
        """What figures depend on besides the candidate."""
        settings = f"{self.arguments.group_size} {self.arguments.evaluator}"
        return hash_of(settings, self.model_hash, *(self._evaluation(name) for name in self.texts))

    def _baseline(self, name: str, measure: Callable[[Evaluator], dict[str, Divergence]]) -> dict:
        path = self.work / f"{name}.json"
        result = read_json(path)
        if result.get("measured") != self.evaluation_hash():
            result = self._measured(measure)
            write_json(path, result)
        return result

    def original(self) -> dict:
        """Figures of the original."""
        return self._baseline("original", Evaluator.of_original)

    def rounding(self, form: str, bits: int) -> dict:
        """Figures of plain rounding, `symmetric` or `asymmetric`."""
        name = form if bits == 4 else f"{form}-{bits}bit"
        group_size = self.arguments.group_size
        return self._baseline(name, lambda evaluator: evaluator.of_rounding(form == "symmetric", bits, group_size))

    def result(self, method: Method, seed: int) -> dict:
        """Quantizes and measures, unless that is done.

        Raises:
            RuntimeError: the method failed.
        """
        seed_work = self.work / f"seed-{seed}"
        output, path = seed_work / method.name, seed_work / f"{method.name}.json"
        command = command_of(method, self.model, self.work, seed_work, self.arguments)
        fingerprint = self._made_from(method, seed)
        result = read_json(path)
        if result.get("made") != fingerprint:
            path.unlink(missing_ok=True)
            if output.exists():
                shutil.rmtree(output)
            seconds = run_logged(command, seed_work / f"{method.name}.log", self.arguments.threads)
            if method.options[:1] == GGUF[:1]:
                as_gguf_folder(self.model, output)
            result = {"made": fingerprint, "cpu_seconds": seconds, "bits": stored_bits(output)}
            write_json(path, result)
        if result.get("measured") != self.evaluation_hash():
            result |= self._measured(lambda evaluator: evaluator.of_folder(output))
            write_json(path, result)
            kl = {text: round(figures["mean_kl"], 4) for text, figures in result["texts"].items()}
            spent = f"{result.get('cpu_seconds', math.nan):.0f} CPU s"
            tell(f"{self.model.name}, {method.label}, seed {seed}: {spent}, mean KL {kl}")
        return result

    def _made_from(self, method: Method, seed: int) -> str:
        """What a quantized checkpoint depends on; a peer's code is known by its environment's name alone."""
        source = hash_of_dsquant() if method.environment is None else method.environment
        options = " ".join(
            [
                *method.options,
                str(self.arguments.group_size),
                *(self.arguments.dsquant_option if method.environment is None else []),
            ]
        )
        return hash_of(options, source, self.model_hash, self.work / f"seed-{seed}" / "calibration.safetensors")

    def finished(self, method: Method, seed: int) -> dict | None:
        """A result as it lies there, if it is of this model, these tokens and this dsquant."""
        result = read_json(self.work / f"seed-{seed}" / f"{method.name}.json")
        current = (self._made_from(method, seed), self.evaluation_hash())
        return result if (result.get("made"), result.get("measured")) == current else None


def as_json(figures: dict[str, Divergence]) -> dict[str, dict[str, float]]:
    """Figures by text as a JSON object."""
    return {text: asdict(row) for text, row in figures.items()}


def tell(line: str) -> None:
    """Says how far it is."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def cell(values: list[float], digits: int) -> str:
    """The mean over seeds and, of several, the standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def row(label: str, results: list[dict], texts: list[str]) -> str:
    """One line of the table."""
    bits = f"{results[0]['bits']:.2f}" if "bits" in results[0] else ""
    measured = [one["cpu_seconds"] for one in results if "cpu_seconds" in one]
    seconds = f"{statistics.mean(measured):.0f}" if measured else ""
    cells = []
    for text in texts:
        figures = [one["texts"][text] for one in results]
        cells += [
            cell([one["mean_kl"] for one in figures], 4),
            cell([one["perplexity"] for one in figures], 3),
            f"{statistics.mean(one['top_1_agreement'] for one in figures):.2%}",
        ]
    seeds = str(len(results)) if bits else ""
    return "| " + " | ".join([label, bits, *cells, seconds, seeds]) + " |"


def table(bench: Bench, methods: list[Method], seeds: list[int]) -> str:
    """A Markdown table of one model's figures, as far as they are there."""
    head = ["method", "bits"]
    for text in bench.texts:
        head += [f"{text}: mean KL", "perplexity", "same top token"]
    head += ["CPU seconds", "seeds"]
    lines = [f"### {bench.model.name}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines.append(row("original", [bench.original()], bench.texts))
    for bits in bench.arguments.rounding_bits:
        for form in ("symmetric", "asymmetric"):
            label = f"plain rounding, {form}" + ("" if bits == 4 else f", {bits} bits")
            lines.append(row(label, [bench.rounding(form, bits)], bench.texts))
    for method in methods:
        found = [result for seed in seeds if (result := bench.finished(method, seed))]
        if found:
            lines.append(row(method.label, found, bench.texts))
    return "\n".join(lines)


def installed(python: str, packages: list[str]) -> str:
    """The versions of packages in an interpreter's environment, in one line."""
    code = (
        "import sys, importlib.metadata as m; have = {d.name.lower().replace('-', '_') for d in m.distributions()}; "
        "print(*(f'{p} {m.version(p)}' for p in sys.argv[1:] if p.lower().replace('-', '_') in have), sep=', ')"
    )
    return subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout.strip()


def conditions(arguments: argparse.Namespace, methods: list[Method]) -> str:
    """What the figures hold for: texts, windows, versions."""
    calibration, evaluation = ("x".join(map(str, shape)) for shape in (arguments.calibration, arguments.evaluation))
    other = f" and of {arguments.wiki.name}" if arguments.wiki else ""
    evaluator = installed(sys.executable, ["torch", "transformers", "autoawq", "compressed-tensors", "gguf"])
    groups = f"groups of {arguments.group_size}"
    lines = [
        f"4 bits, or what a name says; {groups}; every linear of the decoder but the router and lm_head.",
        "bits: stored for each weight.",
        f"Text: {arguments.text.name}, SHA-256 {hash_of(arguments.text)[:16]}….",
        f"Calibration: {calibration} tokens from its first half, chosen by seeds {arguments.seeds}.",
        f"Evaluation: {evaluation} tokens from its second half{other}.",
        "± is the standard deviation over seeds; CPU seconds: the processors' work to quantize, one thread.",
        f"Evaluator: {evaluator}, on {arguments.evaluator}.",
    ]
    for environment in dict.fromkeys(method.environment for method in methods if method.environment):
        python = str(arguments.peers / environment / "bin" / "python")
        lines.append(f"{environment}: {installed(python, VERSIONS[environment])}.")
    return "\n".join(f"- {line}" for line in lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 code that no model was trained on")
    parser.add_argument("--wiki", type=Path, help="UTF-8 text of another kind, for evaluation only")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens, checkpoints and logs")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder of the peers' environments")
    parser.add_argument(
        "--methods",
        nargs="+",
        help="names; left out, dsquant's presets and every peer whose environment is there; single steps and widths "
        "only by name; a name may be a pattern, such as 'dsquant-*bit'",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration windows")
    for name, shape in (("--calibration", CALIBRATION_SHAPE), ("--evaluation", EVALUATION_SHAPE)):
        parser.add_argument(name, type=int, nargs=2, default=shape, metavar=("WINDOWS", "TOKENS"))
    parser.add_argument("--group-size", type=int, default=GROUP_SIZE)
    parser.add_argument("--rounding-bits", type=int, nargs="+", default=[4], help="widths of plain rounding")
    parser.add_argument("--device", help="where dsquant and AutoRound compute; else auto and a CPU")
    parser.add_argument("--evaluator", default="cpu", metavar="DEVICE", help="where the evaluator computes")
    parser.add_argument("--jobs", type=int, default=1, help="methods run at once")
    parser.add_argument("--dsquant", help="another dsquant's command")
    parser.add_argument(
        "--dsquant-option", action="append", default=[], metavar="OPTION", help="one more word for dsquant"
    )
    parser.add_argument("--only-report", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of each method")
    parser.add_argument("--write", type=Path, help="Markdown file for the tables; printed in any case")
    return parser.parse_args(argv)


def run_all(runs: list[tuple[int, Bench, Method]], jobs: int, report: Callable[[], str]) -> bool:
    """Runs methods, several at once if wanted; tells which failed, and goes on.

    Args:
        runs: in this order.
        jobs: how many at once.
        report: called after each.

    Returns:
        Whether one failed.
    """
    failed = False
    pool = ThreadPoolExecutor(jobs)
    try:
        waiting = {pool.submit(run[1].result, run[2], run[0]): run for run in runs}
        for done in as_completed(waiting):
            if (error := done.exception()) is not None:
                seed, bench, method = waiting[done]
                tell(f"{bench.model.name}, {method.label}, seed {seed}: {error}")
                failed = True
            report()
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def main() -> None:
    """Measures every model seed by seed, and writes the tables anew after each result."""
    arguments = parse()
    methods = chosen_methods(arguments.methods, arguments.peers)
    benches = [Bench(model, arguments) for model in arguments.models]
    told = conditions(arguments, methods)

    def report() -> str:
        text = "\n\n".join([told, *(table(bench, methods, arguments.seeds) for bench in benches)]) + "\n"
        if arguments.write:
            arguments.write.parent.mkdir(parents=True, exist_ok=True)
            arguments.write.write_text(text)
        return text

    runs = [(seed, bench, method) for seed in arguments.seeds for bench in benches for method in methods]
    failed = run_all([] if arguments.only_report else runs, arguments.jobs, report)
    print(report())
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
