"""4-bit quantizers side by side: the same model, the same calibration tokens, one independent evaluator.

    python -m benchmarks.quality MODEL [MODEL]... --text FILE --work DIR \\
        --autoawq-python VENV/bin/python --llmcompressor-python VENV/bin/python [--write FILE]

MODEL is a folder with an FP8 DeepSeek-V3 checkpoint that fits in memory. Calibration takes 64 windows of 256
tokens from the first half of the text, evaluation 32 windows of 512 from the second. Each method quantizes
every linear of the decoder but the router, in groups of 128. The figures come from
`benchmarks/peers/reference.py`, which shares no code with dsquant. Run it from the repository's root;
benchmarks/peers/README.md tells how to make the peers' environments.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.reference import Divergence, evaluate
from benchmarks.peers.tokens import halves_of_text, read_tokens, write_tokens

CALIBRATION_SHAPE = (64, 256)
EVALUATION_SHAPE = (32, 512)
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Method:
    """One quantizer to run as a process of its own."""

    label: str
    folder: str
    """The name of its output under the model's work folder."""
    command: list[str]
    is_peer: bool


def peer_methods(arguments: argparse.Namespace, full_precision: Path, tokens: Path, work: Path) -> list[Method]:
    """The peers whose environments were given."""
    peers = [
        ("AutoAWQ, asymmetric", "autoawq", arguments.autoawq_python),
        ("llm-compressor AWQ, symmetric", "llmcompressor", arguments.llmcompressor_python),
    ]
    return [
        Method(
            label,
            module,
            [
                *(python, "-m", f"benchmarks.peers.{module}"),
                *(str(full_precision), str(tokens), str(work / module)),
            ],
            is_peer=True,
        )
        for label, module, python in peers
        if python
    ]


def dsquant_methods(arguments: argparse.Namespace, model: Path, tokens: Path, work: Path) -> list[Method]:
    """dsquant in both forms, unless it is skipped."""
    forms = [
        ("dsquant, asymmetric", "dsquant-awq", ["--to", "awq"]),
        ("dsquant, symmetric", "dsquant-compressed-tensors", ["--to", "compressed-tensors", "--symmetric"]),
    ]
    common = ["--bits", "4", "--preset", "compact", "--calibration", str(tokens), *arguments.dsquant_option]
    return [
        Method(
            label,
            folder,
            [arguments.dsquant, "awq", str(model), *form, *common, "--output", str(work / folder)],
            is_peer=False,
        )
        for label, folder, form in forms
        if not arguments.skip_dsquant
    ]


def run_logged(command: list[str], log: Path, threads: int) -> None:
    """Runs a command from the repository's root and sends what it prints to a file.

    Raises:
        RuntimeError: it failed; holds the end of the log.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as stream:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream).returncode
    if code != 0:
        end = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)}: exit code {code}, log in {log}, which ends:\n{end}")


def run_method(method: Method, work: Path, arguments: argparse.Namespace) -> Path:
    """Quantizes with one method, or finds a peer's finished output where that was asked for.

    Returns:
        The folder of the quantized checkpoint.
    """
    output, done = work / method.folder, work / f"{method.folder}.done"
    fingerprint = hashlib.sha256(" ".join(method.command).encode() + calibration_bytes(work)).hexdigest()
    if method.is_peer and arguments.reuse and done.exists() and done.read_text() == fingerprint:
        return output
    done.unlink(missing_ok=True)
    if output.exists():
        shutil.rmtree(output)
    started = time.monotonic()
    run_logged(method.command, work / f"{method.folder}.log", arguments.threads)
    print(f"{method.label}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    done.write_text(fingerprint)
    return output


def calibration_bytes(work: Path) -> bytes:
    """The calibration file as it lies on disk."""
    return (work / "calibration.safetensors").read_bytes()


def measure(model: Path, arguments: argparse.Namespace) -> dict[str, Divergence]:
    """Quantizes one model with every method and evaluates the results.

    Returns:
        Label -> figures, the original first.
    """
    work = arguments.work.resolve() / model.name
    work.mkdir(parents=True, exist_ok=True)
    calibration, evaluation = work / "calibration.safetensors", work / "evaluation.safetensors"
    shapes = (CALIBRATION_SHAPE, EVALUATION_SHAPE)
    for path, tokens_NT in zip((calibration, evaluation), halves_of_text(model, arguments.text, shapes), strict=True):
        write_tokens(tokens_NT, path)
    full_precision = work / "float32"
    convert = [sys.executable, "-m", "benchmarks.peers.to_bf16", str(model), str(full_precision)]
    run_logged([*convert, "--dtype", "float32"], work / "float32.log", arguments.threads)
    methods = [
        *peer_methods(arguments, full_precision, calibration, work),
        *dsquant_methods(arguments, model, calibration, work),
    ]
    candidates = {method.label: run_method(method, work, arguments) for method in methods}
    return evaluate(model, read_tokens(evaluation), candidates, rounding=True)


def table(model: Path, rows: dict[str, Divergence]) -> str:
    """A Markdown table of one model's figures."""
    lines = [
        f"### {model.name}",
        "",
        "| method | perplexity | mean KL (nats per token) | same top token |",
        "|---|---|---|---|",
    ]
    for label, row in rows.items():
        kl = "0" if label == "original" else f"{row.mean_kl:.4f} ± {row.mean_kl_standard_error:.4f}"
        lines.append(f"| {label} | {row.perplexity:.3f} | {kl} | {row.top_1_agreement:.2%} |")
    return "\n".join(lines)


def installed(python: str, packages: list[str]) -> str:
    """The versions of packages in an interpreter's environment, in one line."""
    code = "import sys, importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep=', ')"
    return subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout.strip()


def conditions(arguments: argparse.Namespace) -> str:
    """What the figures hold for: text, windows, versions."""
    text_hash = hashlib.sha256(arguments.text.read_bytes()).hexdigest()[:16]
    calibration, evaluation = ("x".join(map(str, shape)) for shape in (CALIBRATION_SHAPE, EVALUATION_SHAPE))
    evaluator = installed(sys.executable, ["torch", "transformers", "autoawq", "compressed-tensors"])
    lines = [
        "4 bits, groups of 128, every linear of the decoder but the router and lm_head.",
        f"Text: {arguments.text.name}, SHA-256 {text_hash}….",
        f"Calibration: {calibration} tokens from its first half; evaluation: {evaluation} from its second.",
        "± is one standard error over the evaluation windows.",
        f"Evaluator: {evaluator}.",
    ]
    if arguments.autoawq_python:
        packages = ["autoawq", "transformers", "torch"]
        lines.append(f"AutoAWQ's environment: {installed(arguments.autoawq_python, packages)}.")
    if arguments.llmcompressor_python:
        packages = ["llmcompressor", "compressed-tensors", "transformers", "torch"]
        lines.append(f"llm-compressor's environment: {installed(arguments.llmcompressor_python, packages)}.")
    return "\n".join(f"- {line}" for line in lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text no model was trained on")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens, checkpoints and logs")
    parser.add_argument("--autoawq-python", help="interpreter with AutoAWQ; left out, not run")
    parser.add_argument("--llmcompressor-python", help="interpreter with llm-compressor; left out, not run")
    parser.add_argument("--dsquant", default="dsquant", help="dsquant's command")
    parser.add_argument(
        "--dsquant-option", action="append", default=[], metavar="OPTION", help="one more word for dsquant"
    )
    parser.add_argument("--skip-dsquant", action="store_true")
    parser.add_argument("--reuse", action="store_true", help="keep peers' outputs made from these tokens")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of each method")
    parser.add_argument("--write", type=Path, help="Markdown file for the tables; printed in any case")
    return parser.parse_args(argv)


def main() -> None:
    """Measures every model and prints the tables."""
    arguments = parse()
    tables = [table(model, measure(model, arguments)) for model in arguments.models]
    report = "\n\n".join([conditions(arguments), *tables]) + "\n"
    print(report)
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(report)


if __name__ == "__main__":
    main()
