"""The command line: options become a recipe, and one call. Imports no torch until a command runs."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click

from dsquant import __version__
from dsquant.errors import DsquantError

# Past this size glibc maps memory of its own for a block and gives it back at once; without it the heap keeps what a
# few large tensors once needed.
MALLOC_MMAP_THRESHOLD = 2**20


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dsquant")
def main() -> None:
    """Quantizes DeepSeek-R1 and its family: streamed from disk, resumable, measured against the original.

    \b
    Exit codes: 0 done, 2 wrong usage, 3 bad input (nothing written), 4 a gate failed, 5 inconclusive,
    75 stopped but resumable (SIGTERM, disk full, memory budget exceeded).
    """


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Turns dsquant's errors into messages and exit codes."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        _prepare_process()
        try:
            function(*arguments, **options)
        except DsquantError as error:
            click.echo(f"dsquant: {error}", err=True)
            sys.exit(error.exit_code)

    return run


def _prepare_process() -> None:
    """Settings of this process that a library must not make for its caller."""
    import ctypes

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared machine, waiting threads must not spin
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    mmap_threshold = -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, MALLOC_MMAP_THRESHOLD)


@main.command()
@click.argument("model", default="tiny-r1")
@click.option("--bits", type=click.Choice(["3", "4", "8"]), default="4", show_default=True, help="Bits of a weight.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder to make.  [default: ./NAME-FORMAT-Nbit]")
@click.option(
    "--to",
    multiple=True,
    metavar="FORMAT",
    help="awq, compressed-tensors, or gguf:TYPE with AWQ's scales folded in; may be repeated, for one calibration and "
    "several outputs.  [default: awq]",
)
@click.option(
    "--preset",
    type=click.Choice(["quality", "compact"]),
    help="quality: routed experts only; compact: every linear.  [default: quality; compact for dense models]",
)
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), default="128", show_default=True)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="Without or with zero points.  [default: what the format's engines want]",
)
@click.option(
    "--calibration",
    multiple=True,
    help="A .txt, .jsonl or .parquet file, a mix (code, wiki, r1-mix), or hf:NAME[/CONFIG][:SPLIT][#COLUMN]; may be "
    "repeated.  [default: r1-mix]",
)
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True, help="Calibration samples.")
@click.option("--seq-len", type=click.IntRange(8), default=512, show_default=True, help="Tokens of a sample.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--memory-budget",
    help="Most resident memory, such as 16GiB.  [default: 80 % of what is free, at most 16GiB]",
)
@click.option(
    "--mtp",
    type=click.Choice(["keep", "quantize", "drop"]),
    default="keep",
    show_default=True,
    help="Multi-token-prediction layer: keep in BF16, quantize, or drop.",
)
@click.option("--max-shard-size", default="5GiB", show_default=True, help="Size of the largest output file.")
@click.option("--evaluate/--no-evaluate", default=True, show_default=True, help="Compare with the original at the end.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted job in the output folder, or begin one.")
@click.option("--restart", is_flag=True, help="Begin anew where the output folder holds a job or a result of dsquant.")
@click.option("--dry-run", is_flag=True, help="Validate everything, print the plan, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and no progress bar.")
@_command
def awq(**options: Any) -> None:
    """Quantizes MODEL (a folder, a hub id, or tiny-r1) with AWQ and writes a checkpoint that engines load."""
    if options["resume"] and options["restart"]:
        raise click.UsageError("--resume and --restart exclude each other")
    flags = {name: options.pop(name) for name in ("resume", "restart", "dry_run", "as_json")}
    recipe = _recipe(options)
    from dsquant import pipeline
    from dsquant.display import print_result, progress_bar

    if flags["dry_run"]:
        _print_plan(pipeline.preview(recipe, flags["resume"], flags["restart"]), flags["as_json"])
        return
    with _quiet_libraries(), progress_bar(not flags["as_json"]) as report:
        result = pipeline.awq(recipe, flags["resume"], flags["restart"], report)
    if flags["as_json"]:
        click.echo(json.dumps(result.as_json(), indent=2))
    else:
        print_result(result)


def _recipe(options: dict[str, Any]) -> Any:
    from dsquant.recipe import Recipe, parse_size

    formats = tuple(dict.fromkeys(options["to"])) or ("awq",)
    bits = int(options["bits"])
    name = Path(options["model"]).name
    kind = formats[0].replace(":", "-") if len(formats) == 1 else "quantized"
    return Recipe.checked(
        model=options["model"],
        output=options["output"] or Path(f"{name}-{kind}-{bits}bit"),
        to=formats,
        bits=bits,
        group_size=int(options["group_size"]),
        symmetric=options["symmetric"],
        preset=options["preset"],
        calibration=options["calibration"] or ("r1-mix",),
        samples=options["samples"],
        seq_len=options["seq_len"],
        seed=options["seed"],
        mtp=options["mtp"],
        max_shard_bytes=parse_size(options["max_shard_size"]),
        memory_budget=parse_size(options["memory_budget"]) if options["memory_budget"] else None,
        evaluate=options["evaluate"],
    )


def _print_plan(preview: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(preview, indent=2))
        return
    for key, value in preview.items():
        click.echo(f"{key.replace('_', ' '):24} {value}")


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keeps third-party warnings out of the progress bar."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("transformers", "accelerate", "datasets"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


@main.command()
@click.argument("model", default="tiny-r1")
@click.option(
    "--type",
    "type_name",
    default="Q4_K_M",
    show_default=True,
    help="A type or mixture of llama.cpp, such as Q8_0, Q4_K_M, IQ4_XS, BF16; or Q4_K_M+, which keeps MLA attention, "
    "shared experts and dense layers at Q8_0.",
)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder to make.  [default: ./NAME-TYPE-GGUF]")
@click.option(
    "--calibration",
    multiple=True,
    help="Text to take AWQ's scales and an importance matrix from, as for awq; may be repeated; none: neither.  "
    "[default: r1-mix]",
)
@click.option(
    "--scales/--no-scales", default=True, show_default=True, help="Fold AWQ's scales in, beside the importance matrix."
)
@click.option("--imatrix", type=click.Path(path_type=Path), help="Importance matrix made by llama-imatrix or dsquant.")
@click.option(
    "--tensor-type",
    "tensor_types",
    multiple=True,
    metavar="REGEX=TYPE",
    help="Type of the tensors in whose GGUF names the pattern is found; the first one counts.",
)
@click.option("--split-max-size", help="Write several files of at most this size, such as 48GiB.  [default: one file]")
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True, help="Calibration samples.")
@click.option("--seq-len", type=click.IntRange(8), default=512, show_default=True, help="Tokens of a sample.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--memory-budget",
    help="Most resident memory, such as 16GiB.  [default: 80 % of what is free, at most 16GiB]",
)
@click.option(
    "--mtp",
    type=click.Choice(["keep", "drop"]),
    default="drop",
    show_default=True,
    help="Multi-token-prediction layer: keep as llama.cpp's nextn tensors, or drop.",
)
@click.option("--evaluate/--no-evaluate", default=True, show_default=True, help="Compare with the original at the end.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted job in the output folder, or begin one.")
@click.option("--restart", is_flag=True, help="Begin anew where the output folder holds a job or a result of dsquant.")
@click.option("--dry-run", is_flag=True, help="Validate everything, print the plan, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and no progress bar.")
@_command
def gguf(**options: Any) -> None:
    """Converts MODEL (a folder, a hub id, or tiny-r1) to GGUF files that llama.cpp runs, straight from its shards."""
    if options["resume"] and options["restart"]:
        raise click.UsageError("--resume and --restart exclude each other")
    flags = {name: options.pop(name) for name in ("resume", "restart", "dry_run", "as_json")}
    recipe = _gguf_recipe(options)
    from dsquant import pipeline
    from dsquant.display import print_result, progress_bar

    if flags["dry_run"]:
        _print_plan(pipeline.preview_gguf(recipe, flags["resume"], flags["restart"]), flags["as_json"])
        return
    with _quiet_libraries(), progress_bar(not flags["as_json"]) as report:
        result = pipeline.gguf(recipe, flags["resume"], flags["restart"], report)
    if flags["as_json"]:
        click.echo(json.dumps(result.as_json(), indent=2))
    else:
        print_result(result)


def _gguf_recipe(options: dict[str, Any]) -> Any:
    from dsquant.recipe import GgufRecipe, parse_size

    type_name = options.pop("type_name").upper()
    split, budget = options.pop("split_max_size"), options.pop("memory_budget")
    output = options.pop("output") or Path(f"{Path(options['model']).name}-{type_name}-GGUF")
    texts = options.pop("calibration")
    return GgufRecipe.checked(
        **options,
        calibration=() if texts == ("none",) else (texts or None),
        type=type_name,
        output=output,
        split_max_bytes=parse_size(split) if split else 0,
        memory_budget=parse_size(budget) if budget else None,
    )


@main.command("eval")
@click.argument("reference")
@click.argument("candidate")
@click.option("--text", "texts", multiple=True, help="Text file; may be repeated.  [default: shipped held-out texts]")
@click.option("--samples", type=click.IntRange(1), default=8, show_default=True, help="Samples of each text.")
@click.option("--seq-len", type=click.IntRange(8), default=512, show_default=True, help="Tokens of a sample.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and no progress bar.")
@_command
def evaluate(reference: str, candidate: str, texts: tuple[str, ...], samples: int, seq_len: int, as_json: bool) -> None:
    """Measures how far CANDIDATE is from REFERENCE: perplexity, KL divergence, top-1 agreement."""
    from dsquant import pipeline
    from dsquant.display import print_evaluation, progress_bar

    with _quiet_libraries(), progress_bar(not as_json) as report:
        evaluation = pipeline.evaluate(reference, candidate, list(texts), seq_len, samples, report)
    if as_json:
        click.echo(json.dumps(evaluation.as_json(), indent=2))
    else:
        print_evaluation(evaluation)


@main.command()
@click.argument("model", default="tiny-r1")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_command
def inspect(model: str, as_json: bool) -> None:
    """Describes MODEL from its headers alone."""
    from dsquant.inspection import describe

    found = describe(model)
    click.echo(json.dumps(vars(found), indent=2) if as_json else str(found))
