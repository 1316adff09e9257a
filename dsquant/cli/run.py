"""The command `dsquant run`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsquant.cli.fields import FieldsCommand
from dsquant.cli.job_steps import show_result
from dsquant.cli.process import dsquant_command, json_option, reporting

if TYPE_CHECKING:
    from pydantic import BaseModel


def _models() -> "tuple[type[BaseModel], ...]":
    from dsquant.running import Metrics

    return (Metrics,)


@click.command(cls=FieldsCommand, models=_models, own_first=True)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--model", help="Instead of the recipe's.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Instead of the recipe's.")
@click.option("--resume", is_flag=True, hidden=True)
@json_option
@dsquant_command
def run(recipe: Path, model: str | None, output: Path | None, resume: bool, as_json: bool, **options: Any) -> None:
    """Runs RECIPE (YAML): calibrate, quantize to several formats, evaluate, gate, publish.

    A finished recipe is left alone; one that was stopped anywhere continues where it was, without --resume.

    \b
    model: tiny-r1
    output: released
    calibration: {texts: [r1-mix], samples: 64, seq_len: 512, seed: 0}
    quantize:
      - {name: four, to: [awq], preset: compact}
      - {name: mixed, to: [compressed-tensors], target_bits: 4.5}
      - {name: k-quants, type: Q4_K_M, target_size: 5MiB}
    evaluate: {samples: 8, seq_len: 512, texts: [code], prompts: python}
    gates: {gates: [{metric: mean_kl, at_most: 0.02}]}
    publish: rename

    Entries with `to` also take bits, steps, group_size, symmetric, mtp, kv_b, rest, activations and
    max_shard_size, those with `type` tensor_types, imatrix, calibrate, scales, mtp and split_max_size; the file also
    device, budgets and on_failure.
    """
    from dsquant.options import taken
    from dsquant.releases.recipe import read_recipe
    from dsquant.releases.release_job import published, run_recipe
    from dsquant.running import Metrics

    metrics, read = taken(Metrics, options), read_recipe(recipe, model, output)
    release = published(read)
    if release is None:  # only now is torch imported
        with reporting(not as_json, metrics) as report:
            release = run_recipe(read, report, str(recipe))
    elif metrics.metrics_file is not None:  # nothing to do is a success too
        from dsquant.reporting.progress import silent
        from dsquant.reporting.prometheus import monitored

        with monitored(silent, metrics.metrics_file):
            pass
    show_result(release, as_json)
