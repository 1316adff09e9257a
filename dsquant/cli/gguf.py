"""The command `dsquant gguf`."""

import json
from pathlib import Path
from typing import Any

import click

from dsquant.cli.process import dsquant_command, metrics_options, reporting
from dsquant.escaping import printable


@click.command()
@click.argument("model", default="tiny-r1", metavar="[MODEL=tiny-r1]")
@click.option(
    "--type",
    "type_name",
    default="Q4_K_M",
    show_default=True,
    help="A type or mixture of llama.cpp, such as Q8_0, Q4_K_M, IQ4_XS, BF16; or Q4_K_M+, which keeps MLA attention, "
    "shared experts and dense layers at Q8_0.",
)
@click.option(
    "--target-bits",
    type=float,
    help="Mean stored bits of the decoder's weights, such as 4.5: each of their tensors gets a type by measured "
    "sensitivity; --type is then for the others.",
)
@click.option("--target-size", help="The same, for the size of all tensors, such as 340GiB.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Folder to make.  [default: ./NAME-TYPE-GGUF; the target in the place of TYPE]",
)
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
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--evaluate/--no-evaluate", default=True, show_default=True, help="Compare with the original at the end.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted job in the output folder, or begin one.")
@click.option("--restart", is_flag=True, help="Begin anew where the output folder holds a job or a result of dsquant.")
@click.option("--dry-run", is_flag=True, help="Validate everything, print the plan, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and no progress bar.")
@metrics_options
@dsquant_command
def gguf(**options: Any) -> None:
    """Converts MODEL (a folder, a hub id, or tiny-r1) to GGUF files that llama.cpp runs, straight from its shards."""
    if options["resume"] and options["restart"]:
        raise click.UsageError("--resume and --restart exclude each other")
    flags = {name: options.pop(name) for name in ("resume", "restart", "dry_run", "as_json")}
    metrics = (options.pop("metrics_file"), options.pop("metrics_port"), options.pop("metrics_address"))
    recipe = _gguf_recipe(options)
    from dsquant.pipeline import job as pipeline
    from dsquant.reporting.terminal import print_result

    if flags["dry_run"]:
        plan = pipeline.preview(recipe, flags["resume"], flags["restart"])
        click.echo(json.dumps(plan.as_json(), indent=2) if flags["as_json"] else printable(str(plan)))
        return
    with reporting(not flags["as_json"], *metrics) as report:
        result = pipeline.run_job(recipe, flags["resume"], flags["restart"], report)
    if flags["as_json"]:
        click.echo(json.dumps(result.as_json(), indent=2))
    else:
        print_result(result)


def _gguf_recipe(options: dict[str, Any]) -> Any:
    from dsquant.recipes import gguf_recipe, parse_size

    type_name = options.pop("type_name").upper()
    split, budget, size = (options.pop(name) for name in ("split_max_size", "memory_budget", "target_size"))
    output = options.pop("output")
    recipe = gguf_recipe(
        **options | {"calibration": options["calibration"] or None},
        type=type_name,
        target_size=parse_size(size) if size is not None else None,
        output=output or ".",
        split_max_bytes=parse_size(split) if split is not None else 0,
        memory_budget=parse_size(budget) if budget is not None else None,
    )
    name = f"{Path(recipe.model).name}-{recipe.target_name or type_name}-GGUF"
    return recipe if output else recipe.model_copy(update={"output": Path(name)})
