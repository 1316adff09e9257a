"""The command `dsquant run`."""

import json
from pathlib import Path

import click

from dsquant.cli.process import dsquant_command, metrics_options, reporting


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--model", help="Instead of the recipe's.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Instead of the recipe's.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and no progress bar.")
@metrics_options
@dsquant_command
def run(
    recipe: Path,
    model: str | None,
    output: Path | None,
    as_json: bool,
    metrics_file: Path | None,
    metrics_port: int | None,
    metrics_address: str | None,
) -> None:
    """Runs RECIPE (YAML): calibrate, quantize to several formats, evaluate, gate, publish.

    A finished recipe is left alone; one that was stopped anywhere goes on where it was.

    \b
    model: tiny-r1
    output: released
    calibration: {texts: [r1-mix], samples: 64, seq_len: 512, seed: 0}
    quantize:
      - {name: four, to: [awq], preset: compact}
      - {name: mixed, to: [compressed-tensors], target_bits: 4.5}
      - {name: k-quants, type: Q4_K_M, target_size: 340GiB}
    evaluate: {samples: 8, seq_len: 512, texts: [code.txt], prompts: python}
    gates: {gates: [{metric: mean_kl, at_most: 0.02}]}
    publish: rename

    Entries with `to` also take bits, steps, group_size, symmetric, mtp and max_shard_size, those with `type`
    tensor_types, imatrix, calibrate, scales, mtp and split_max_size; the file also device, budgets and on_failure.
    """
    from dsquant.releases.recipe import read_recipe
    from dsquant.releases.release_job import published, run_recipe

    read = read_recipe(recipe, model, output)
    release = published(read)
    if release is None:  # only now is torch imported
        with reporting(not as_json, metrics_file, metrics_port, metrics_address) as report:
            release = run_recipe(read, report, str(recipe))
    elif metrics_file is not None:  # nothing to do is a success too
        from dsquant.reporting.progress import silent
        from dsquant.reporting.prometheus import monitored

        with monitored(silent, metrics_file):
            pass
    if as_json:
        click.echo(json.dumps(release.as_json(), indent=2))
        return
    from dsquant.reporting.terminal import print_result

    print_result(release)
