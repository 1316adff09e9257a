"""The command `dsquant awq`."""

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dsquant.cli.process import dsquant_command, metrics_options, reporting
from dsquant.errors import UsageError
from dsquant.escaping import printable
from dsquant.jobs.launcher import several_ranks


@click.command()
@click.argument("model", default="tiny-r1", metavar="[MODEL=tiny-r1]")
@click.option(
    "--bits",
    type=click.Choice(["3", "4", "8"]),
    default="4",
    show_default=True,
    help="Bits of a weight; with a target, those that scales are searched for.",
)
@click.option(
    "--target-bits",
    type=float,
    help="Mean stored bits of what the preset quantizes, scales included, such as 4.5: widths (4, 8, BF16; 3 where "
    "nothing else fits; for awq 4 or BF16) are chosen by measured sensitivity.",
)
@click.option("--target-size", help="The same, for the size of all tensors, such as 340GiB.")
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
    type=click.Choice(["quality", "compact", "best"]),
    help="quality: routed experts only; compact: every linear; best: every linear, each for what the quantized model "
    "gives it, least drift, slower.  [default: quality; compact for dense models]",
)
@click.option(
    "--steps",
    metavar="LIST",
    help="How the linears are quantized: some of scales, clip, compensate, top-up, gate-weights, follow, descend, with "
    "commas, or none.  [default: scales, clip, compensate, top-up; for best follow and descend too]",
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
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--gpu-memory-budget",
    help="Most GPU memory, such as 16GiB.  [default: 90 % of what is free, at most 16GiB]",
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
@click.option(
    "--scales-from",
    type=click.Path(path_type=Path),
    help="Quantize under the scales and grids that this output of an earlier release recorded, without calibration; "
    "every other setting comes from there.",
)
@metrics_options
@dsquant_command
def awq(**options: Any) -> None:
    """Quantizes MODEL (a folder, a hub id, or tiny-r1) with AWQ and writes a checkpoint that engines load."""
    if options["resume"] and options["restart"]:
        raise click.UsageError("--resume and --restart exclude each other")
    flags = {name: options.pop(name) for name in ("resume", "restart", "dry_run", "as_json")}
    metrics = (options.pop("metrics_file"), options.pop("metrics_port"), options.pop("metrics_address"))
    scales_from = options.pop("scales_from")
    if scales_from is not None:
        _check_alone()
    recipe = _recipe(options)
    from dsquant.pipeline import job as pipeline
    from dsquant.reporting.terminal import print_result

    if scales_from is not None and several_ranks():
        raise UsageError("--scales-from runs in one process; start it without a launcher")
    if flags["dry_run"]:
        if several_ranks():
            raise UsageError("--dry-run runs in one process; start it without a launcher")
        plan = pipeline.preview(recipe, flags["resume"], flags["restart"])
        click.echo(json.dumps(plan.as_json(), indent=2) if flags["as_json"] else printable(str(plan)))
        return
    from dsquant.jobs.ranks import joined

    with joined() as ranks, reporting(not flags["as_json"], *metrics, ranks.first) as report:
        if scales_from is None:
            result = pipeline.run_job(recipe, flags["resume"], flags["restart"], report, ranks)
        else:
            from dsquant.incremental.release import full_run

            again = (flags["resume"], flags["restart"])
            result = full_run(recipe.model, scales_from, recipe.output, *again, report)
    if ranks.first:
        if flags["as_json"]:
            click.echo(json.dumps(result.as_json(), indent=2))
        else:
            print_result(result)


def _check_alone() -> None:
    """Refuses settings beside --scales-from: they all come from there."""
    context = click.get_current_context()
    metrics = ("metrics_file", "metrics_port", "metrics_address")
    allowed = ("model", "output", "scales_from", "resume", "restart", "as_json", *metrics)
    given = ParameterSource.COMMANDLINE
    others = [name for name in context.params if name not in allowed and context.get_parameter_source(name) == given]
    if others:
        name = others[0].replace("_", "-")
        raise click.UsageError(f"--scales-from takes every other setting from there; leave --{name} out")


def _recipe(options: dict[str, Any]) -> Any:
    from dsquant.recipes import Recipe, parse_size

    formats = tuple(dict.fromkeys(options["to"])) or ("awq",)
    bits = int(options["bits"])
    recipe = Recipe.checked(
        model=options["model"],
        output=options["output"] or ".",
        to=formats,
        bits=bits,
        target_bits=options["target_bits"],
        target_size=parse_size(options["target_size"]) if options["target_size"] is not None else None,
        group_size=int(options["group_size"]),
        symmetric=options["symmetric"],
        preset=options["preset"],
        steps=options["steps"],
        calibration=options["calibration"] or ("r1-mix",),
        samples=options["samples"],
        seq_len=options["seq_len"],
        seed=options["seed"],
        mtp=options["mtp"],
        device=options["device"],
        gpu_memory_budget=parse_size(options["gpu_memory_budget"])
        if options["gpu_memory_budget"] is not None
        else None,
        max_shard_bytes=parse_size(options["max_shard_size"]),
        memory_budget=parse_size(options["memory_budget"]) if options["memory_budget"] is not None else None,
        evaluate=options["evaluate"],
    )
    kind = formats[0].replace(":", "-") if len(formats) == 1 else "quantized"
    name = f"{Path(recipe.model).name}-{kind}-{recipe.target_name or f'{bits}bit'}"
    return recipe if options["output"] else recipe.model_copy(update={"output": Path(name)})
