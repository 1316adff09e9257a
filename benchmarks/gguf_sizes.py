"""GGUF files at equal bits: llama.cpp's mixtures, types by hand, and dsquant, on one set of calibration tokens.

    python -m benchmarks.gguf_sizes MODEL... --text FILE --wiki FILE --work DIR [--llama DIR] \\
        [--seeds 0 1 2] [--mixtures NAME...] [--makers NAME...] [--jobs 2] [--apart] [--write FILE]

MODEL is a folder with a DeepSeek-V3 or Llama checkpoint that fits in memory; `--llama` holds llama-imatrix and
llama-quantize (`benchmarks/peers/make_environments DIR llamacpp` compiles them into DIR/llamacpp/bin). A row of a table
is a mixture of llama.cpp; its columns are makers:

    llama        llama-quantize with the matrix of llama-imatrix
    rules        the same with types by hand, as Unsloth gives them to R1
    scales       dsquant with the mixture's types and AWQ's scales alone
    compact      dsquant with the mixture's types, preset compact
    best         dsquant with the mixture's types, preset best
    chosen       dsquant, preset compact, with types chosen for the mixture's bits
    chosen-best  the same, preset best

Embedding and head stay F32 in every file and do not count in its bits; routers, F32 too, do not either. All makers see
the same tokens; evaluation is in `benchmarks/peers/reference.py`. What is finished in DIR is not done again. Without
`--llama`, makers take the bits of llama.cpp's files from DIR.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.peers.decoding import gguf_bits
from benchmarks.peers.reference import Evaluator
from benchmarks.peers.tokens import chosen_windows, halves, read_tokens, spaced_windows, tokens_of, write_tokens
from benchmarks.quality import as_json, cell, hash_of, hash_of_dsquant, read_json, tell
from dsquant.formats.gguf.types import MIXTURES, fitting_type, row_bytes
from dsquant.recipes import Recipe

ROWS = ("IQ1_S", "IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K_M", "IQ4_XS", "Q4_K_M")
FLOATS = r"^(token_embd|output)\.weight$=F32"
STEPS: dict[str, Mapping[str, Any]] = {
    "scales": {"preset": "compact", "steps": "scales"},
    "compact": {"preset": "compact"},
    "best": {"preset": "best"},
}
"""Maker -> fields of dsquant's recipe; one job makes all its rows, or with `--apart` one."""
CHOSEN: dict[str, Mapping[str, Any]] = {"chosen": STEPS["compact"], "chosen-best": STEPS["best"]}
"""The same with types chosen, a job for each row."""
MAKERS = ("llama", "rules", *STEPS, *CHOSEN)
# Types of the routed experts in rules made by hand (in a dense model: of its MLPs), from the fewest bits.
LADDER = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
# Types of attention and dense layers; of latents, shared experts and the dense layers' `down`.
AROUND = (("IQ2_XXS", "IQ3_XXS"), ("IQ3_XXS", "IQ4_XS"), ("Q4_K", "Q6_K"), ("Q6_K", "Q8_0"))
LARGEST_PLAIN_KL = 1e-5


@dataclass(frozen=True)
class Case:
    """A model with the calibration tokens of one seed."""

    model: Path
    seed: int
    folder: Path
    """Holds the tokens, the importance matrix, and a folder for each maker."""

    @property
    def tokens(self) -> Path:
        return self.folder / "calibration.safetensors"

    @property
    def imatrix(self) -> Path:
        return self.folder / "imatrix.gguf"

    @property
    def plain(self) -> Path:
        """The model in float32, which llama.cpp's programs read."""
        return self.folder.parent / "F32" / "model.gguf"

    def place(self, maker: str, row: str) -> Path:
        """The folder of a candidate."""
        return self.folder / maker / row


def keep(file: Path, model: Path, folder: Path) -> None:
    """Moves a GGUF file into a folder of its own, with a config.json for the evaluator."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.move(file, folder / "model.gguf")
    config = read_json(model / "config.json") | {"quantization_config": {"quant_method": "gguf"}}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


@dataclass(frozen=True)
class Evaluation:
    """What files are compared on, and where."""

    texts: tuple[tuple[str, Path], ...]
    device: str


def made_from(case: Case, maker: str, evaluation: Evaluation) -> str:
    """What a figure depends on; llama.cpp is known by its program's name alone."""
    source = "llama-quantize" if maker in ("llama", "rules") else hash_of_dsquant()
    model = hash_of(*sorted(case.model.glob("*.safetensors")))
    return hash_of(source, model, case.tokens, *(path for _, path in evaluation.texts))


@lru_cache(maxsize=1)
def evaluator(model: Path, plain: Path, evaluation: Evaluation) -> Evaluator:
    """The evaluator of a model, made once in a process.

    Raises:
        RuntimeError: the float32 file already differs from the original.
    """
    made = Evaluator(model, {name: read_tokens(path) for name, path in evaluation.texts}, evaluation.device)
    figures = made.of_folder(plain.parent)
    if max(one.mean_kl for one in figures.values()) > LARGEST_PLAIN_KL:
        raise RuntimeError(f"{model.name}: the F32 file is another model: {as_json(figures)}")
    return made


def measure(case: Case, maker: str, row: str, evaluation: Evaluation) -> None:
    """Compares a file with the original, and removes it."""
    folder = case.place(maker, row)
    figures = as_json(evaluator(case.model, case.plain, evaluation).of_folder(folder))
    result = {"made": made_from(case, maker, evaluation), "bits": gguf_bits(folder), "texts": figures}
    folder.with_suffix(".json").write_text(json.dumps(result, indent=2))
    shutil.rmtree(folder)
    kl = {text: round(one["mean_kl"], 4) for text, one in figures.items()}
    tell(f"{case.model.name}, seed {case.seed}, {maker} {row}: {result['bits']:.2f} bits, mean KL {kl}")


def recipe_of(
    case: Case, maker: str, rows: Sequence[str], output: Path, device: str = "auto", target_bits: float | None = None
) -> Recipe:
    """The job that makes rows, or one row of chosen types: then the mixture gives types to nothing that counts."""
    return Recipe.checked(
        model=str(case.model),
        output=output,
        to=tuple(f"gguf:{'Q4_K_M' if target_bits else row}" for row in rows),
        mtp="drop",
        tensor_types=(FLOATS,),
        calibration=(str(case.tokens),),
        evaluate=False,
        device=device,
        target_bits=target_bits,
        **(STEPS | CHOSEN)[maker],
    )


def run_dsquant(
    case: Case, maker: str, rows: Sequence[str], evaluation: Evaluation, device: str, target_bits: float | None = None
) -> None:
    """Makes rows of one maker in one job, and measures them."""
    from dsquant.pipeline.job import run_job
    from dsquant.reporting.terminal import progress_bar

    output = case.folder / f"{maker}-{'-'.join(rows)}.job"
    shutil.rmtree(output, ignore_errors=True)
    recipe = recipe_of(case, maker, rows, output, device, target_bits)
    with progress_bar(False) as report:
        run_job(recipe, False, False, report)
    for row in rows:
        (found,) = output.rglob(f"*-{recipe.target_name or row}.gguf")
        keep(found, case.model, case.place(maker, row))
    shutil.rmtree(output)
    for row in rows:
        measure(case, maker, row, evaluation)


def make_plain(case: Case) -> None:
    """Writes the model as float32 GGUF."""
    import dsquant

    output = case.plain.parent.with_suffix(".job")
    shutil.rmtree(output, ignore_errors=True)
    options = {"calibration": "none", "mtp": "drop", "evaluate": False, "progress": False}
    result = dsquant.gguf(case.model, type="F32", output=output, **options)
    keep(result.folders["gguf:F32"], case.model, case.plain.parent)
    shutil.rmtree(output)


def run_llama(program: Path, *words: Any) -> None:
    """Runs one of llama.cpp's programs with one thread.

    Raises:
        RuntimeError: it failed; holds the end of what it printed.
    """
    done = subprocess.run([program, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        end = done.stdout[-1500:].decode(errors="replace")
        raise RuntimeError(f"{program.name}: exit code {done.returncode}, its output ends:\n{end}")


def make_imatrix(case: Case, llama: Path) -> None:
    """Runs llama-imatrix on the calibration tokens' text, in chunks of the same length."""
    from tokenizers import Tokenizer

    tokens_NT = read_tokens(case.tokens)
    tokenizer = Tokenizer.from_file(str(case.model / "tokenizer.json"))
    text = case.folder / "calibration.txt"
    text.write_text("".join(tokenizer.decode(row) for row in tokens_NT.tolist()), encoding="utf-8")
    # It writes in between unless told otherwise: the file is there when it is whole.
    partial = case.imatrix.with_suffix(".part.gguf")
    threads = min(4, len(os.sched_getaffinity(0)))
    words = ("-f", text, "-o", partial, "-c", tokens_NT.shape[1], "-t", threads, "--no-ppl", "-ngl", 0)
    run_llama(llama / "llama-imatrix", "-m", case.plain, *words)
    partial.replace(case.imatrix)


def run_quantize(case: Case, maker: str, row: str, evaluation: Evaluation, llama: Path) -> None:
    """Runs llama-quantize, for `rules` with types by hand, and measures the file."""
    types = hand_made(matrices(case.plain), target_bits(case, row)) if maker == "rules" else {}
    words = [word for pattern, name in types.items() for word in ("--tensor-type", f"{pattern}={name.lower()}")]
    kept = ("--token-embedding-type", "f32", "--output-tensor-type", "f32")
    file = case.folder / f"{maker}-{row}.gguf"
    run_llama(llama / "llama-quantize", "--imatrix", case.imatrix, *kept, *words, case.plain, file, row, 1)
    keep(file, case.model, case.place(maker, row))
    measure(case, maker, row, evaluation)


def matrices(file: Path) -> dict[str, tuple[int, ...]]:
    """The matrices of the layers but the routers: name -> shape, columns last."""
    from gguf import GGUFReader

    return {
        tensor.name: tuple(int(extent) for extent in reversed(tensor.shape))
        for tensor in GGUFReader(file).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name
    }


def hand_made(shapes: Mapping[str, tuple[int, ...]], bits: float) -> dict[str, str]:
    """Types by hand, as Unsloth gives them to R1, for the mean bits that come nearest to a mixture's.

    R1's are 4 and 6 bits for attention, dense layers and shared experts, few for routed experts, and for their `down`
    one type more in the first eighth of the layers. Where routed experts are not nearly all weights, as in R1, the
    others need fewer bits for a file of the same size. In a model without experts the MLPs take their place.

    Args:
        shapes: from `matrices`.
        bits: mean bits of the mixture.

    Returns:
        Pattern in a tensor's name -> type; each tensor fits one.
    """
    experts = "_exps" if any("_exps." in name for name in shapes) else ""
    layers = sorted({int(name.split(".")[1]) for name in shapes if f".ffn_down{experts}." in name})
    first = layers[: max(1, len(layers) // 8)]

    def rules(step: int, plain: str, high: str) -> dict[str, str]:
        base, more = LADDER[step], LADDER[min(step + 1, len(LADDER) - 1)]
        numbers, others = ("|".join(map(str, some)) for some in (first, layers[len(first) :] or [-1]))
        types = {
            r"attn_(q_a|q_b|q|output)\.weight": plain,
            r"attn_(kv_a_mqa|k_b|v_b|k|v)\.weight": high,
            rf"ffn_(gate|up){experts}\.weight": base,
            rf"blk\.({numbers})\.ffn_down{experts}\.weight": more,
            rf"blk\.({others})\.ffn_down{experts}\.weight": base,
        }
        if experts:
            types |= {r"ffn_(gate|up)\.weight": plain, r"(ffn_down|ffn_(gate|up|down)_shexp)\.weight": high}
        return types

    possible = [rules(step, *pair) for step in range(len(LADDER)) for pair in AROUND if LADDER.index(pair[0]) >= step]
    return min(possible, key=lambda types: abs(mean_bits(shapes, types) - bits))


def mean_bits(shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> float:
    """The stored bits of a weight with types by pattern."""
    stored = 0
    for name, shape in shapes.items():
        (wanted,) = (one for pattern, one in types.items() if re.search(pattern, name))
        stored += 8 * row_bytes(fitting_type(wanted, shape[-1]), shape[-1]) * prod(shape[:-1])
    return stored / sum(map(prod, shapes.values()))


def target_bits(case: Case, row: str) -> float:
    """The bits of llama.cpp's file, rounded down."""
    return math.floor(1000 * read_json(case.place("llama", row).with_suffix(".json"))["bits"]) / 1000


class Bench:
    """The work folder of one model: its cases, its figures."""

    def __init__(self, model: Path, arguments: argparse.Namespace) -> None:
        """Writes tokens, unless they are there."""
        self.model, self.arguments = model, arguments
        self.work = arguments.work.resolve() / model.name
        calibration_text, evaluation_text = halves(arguments.text)
        texts = {"code": evaluation_text, "wiki": arguments.wiki.read_text(encoding="utf-8")}
        paths = {name: self.work / f"evaluation-{name}.safetensors" for name in texts}
        for name, text in texts.items():
            write_tokens(spaced_windows(tokens_of(model, text), *arguments.evaluation), paths[name])
        self.evaluation = Evaluation(tuple(paths.items()), arguments.evaluator)
        tokens = tokens_of(model, calibration_text)
        self.cases = [Case(model.resolve(), seed, self.work / f"seed-{seed}") for seed in arguments.seeds]
        for case in self.cases:
            write_tokens(chosen_windows(tokens, *arguments.calibration, case.seed), case.tokens)

    def result(self, case: Case, maker: str, row: str) -> dict:
        """Figures as they lie there, empty if they are of another model, other tokens or another dsquant."""
        result = read_json(case.place(maker, row).with_suffix(".json"))
        return result if result and result["made"] == made_from(case, maker, self.evaluation) else {}

    def missing(self, case: Case, maker: str) -> list[str]:
        """The rows that a maker can make and has not."""
        possible = [row for row in self.arguments.mixtures if maker not in STEPS or row in MIXTURES]
        return [row for row in possible if not self.result(case, maker, row)]


Task = tuple[Callable[..., None], tuple[Any, ...]]


def run_all(tasks: Sequence[Task], jobs: int) -> None:
    """Runs tasks in forked processes; tells which failed, and goes on."""
    with ProcessPoolExecutor(max(1, min(jobs, len(tasks))), get_context("fork")) as pool:
        waiting = {pool.submit(run, *values): f"{run.__name__} {values}" for run, values in tasks}
        for done in as_completed(waiting):
            if (error := done.exception()) is not None:
                tell(f"{waiting[done]}: {type(error).__name__}: {error}")


def make_by_llama(pairs: Sequence[tuple[Bench, Case]], makers: Sequence[str], llama: Path, jobs: int) -> None:
    """Makes and measures what llama.cpp's programs make, its own mixtures also where only their bits are needed."""
    of_llama = [maker for maker in ("llama", "rules") if maker in makers]
    if "llama" not in of_llama and {"rules", *CHOSEN} & set(makers):
        of_llama = ["llama", *of_llama]
    if any(bench.missing(case, maker) for maker in of_llama for bench, case in pairs):
        run_all([(make_imatrix, (case, llama)) for _, case in pairs if not case.imatrix.exists()], jobs)
    for maker in of_llama:
        wanted = [
            (run_quantize, (case, maker, row, bench.evaluation, llama))
            for bench, case in pairs
            for row in bench.missing(case, maker)
        ]
        run_all(wanted, jobs)


def make(benches: Sequence[Bench], arguments: argparse.Namespace) -> None:
    """Makes and measures every file that is missing, stage by stage: each needs what the one before has made."""
    jobs = arguments.jobs
    pairs = sorted(((bench, case) for bench in benches for case in bench.cases), key=lambda pair: pair[1].seed)
    run_all([(make_plain, (bench.cases[0],)) for bench in benches if not bench.cases[0].plain.exists()], jobs)
    if arguments.llama:
        make_by_llama(pairs, arguments.makers, arguments.llama.resolve(), jobs)
    tasks: list[Task] = []  # the longest jobs first
    for bench, case in pairs:
        told = (bench.evaluation, arguments.device)
        for maker in (one for one in reversed(STEPS) if one in arguments.makers):
            rows = bench.missing(case, maker)
            for together in ([row] for row in rows) if arguments.apart else [rows] if rows else []:
                tasks.append((run_dsquant, (case, maker, together, *told)))
        for maker in (one for one in reversed(CHOSEN) if one in arguments.makers):
            for row in bench.missing(case, maker):
                tasks.append((run_dsquant, (case, maker, [row], *told, target_bits(case, row))))
    run_all(tasks, jobs)


def table(bench: Bench, arguments: argparse.Namespace) -> str:
    """A Markdown table of one model's figures, as far as they are there."""
    lines = [f"### {bench.model.name}", ""]
    for text, _ in bench.evaluation.texts:
        lines += [f"| {text}, mean KL | bits | " + " | ".join(arguments.makers) + " |"]
        lines += ["|---" * (2 + len(arguments.makers)) + "|"]
        for row in arguments.mixtures:
            found = {maker: [bench.result(case, maker, row) for case in bench.cases] for maker in arguments.makers}
            found = {maker: [one for one in results if one] for maker, results in found.items()}
            if any(found.values()):
                lines.append(line(row, text, found))
        lines.append("")
    return "\n".join(lines)


def line(row: str, text: str, found: Mapping[str, list[dict]]) -> str:
    """One line: a mixture's bits; each maker's KL, its bits where they are others, its part of llama.cpp's KL."""
    base = found.get("llama") or []
    bits = base[0]["bits"] if base else float("nan")
    cells = [row, f"{bits:.2f}"]
    for maker, results in found.items():
        if not results:
            cells.append("")
            continue
        values = [one["texts"][text]["mean_kl"] for one in results]
        words = cell(values, 4)
        own = statistics.mean(one["bits"] for one in results)
        if abs(own - bits) > 0.005:
            words += f" ({own:.2f} bits)"
        if base and maker != "llama":
            words += f", {statistics.mean(values) / statistics.mean(b['texts'][text]['mean_kl'] for b in base):.2f}"
        cells.append(words)
    return "| " + " | ".join(cells) + " |"


def report(benches: Sequence[Bench], arguments: argparse.Namespace) -> str:
    """What the figures hold for, and the tables."""
    calibration, evaluation = ("x".join(map(str, shape)) for shape in (arguments.calibration, arguments.evaluation))
    told = f"""\
- Calibration: {calibration} tokens of the first half of {arguments.text.name}, SHA-256 {hash_of(arguments.text)[:16]}…,
  chosen by seeds {arguments.seeds}.
- Evaluation: {evaluation} tokens of its second half, and of {arguments.wiki.name}.
- A cell: mean KL from the original, ± its standard deviation over seeds; stored bits of a weight where they are not
  those of llama.cpp's file; the KL as a part of llama.cpp's."""
    tables = [table(bench, arguments) for bench in benches]
    return "\n\n".join([told, *tables])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    shape = {"type": int, "nargs": 2, "metavar": ("SAMPLES", "TOKENS")}
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 code that no model was trained on")
    parser.add_argument("--wiki", type=Path, required=True, help="UTF-8 text of another kind, for evaluation only")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens, files and figures")
    parser.add_argument("--llama", type=Path, help="folder of llama-imatrix and llama-quantize")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration windows")
    parser.add_argument("--mixtures", nargs="+", default=list(ROWS), help="rows of the tables")
    parser.add_argument("--makers", nargs="+", default=list(MAKERS), choices=MAKERS, help="columns of the tables")
    parser.add_argument("--calibration", default=(32, 512), **shape)
    parser.add_argument("--evaluation", default=(16, 512), **shape)
    parser.add_argument("--jobs", type=int, default=1, help="files made at once")
    parser.add_argument("--apart", action="store_true", help="a job for each file: shorter where many run at once")
    parser.add_argument("--device", default="auto", help="where dsquant computes")
    parser.add_argument("--evaluator", default="cpu", metavar="DEVICE", help="where the evaluator computes")
    parser.add_argument("--only-report", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--write", type=Path, help="Markdown file for the tables; printed in any case")
    return parser.parse_args(argv)


def main() -> None:
    """Makes all files, measures them, and writes the tables."""
    arguments = parse()
    benches = [Bench(model, arguments) for model in arguments.models]
    if not arguments.only_report:
        make(benches, arguments)
    text = report(benches, arguments)
    if arguments.write:
        arguments.write.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
