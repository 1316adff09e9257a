"""The command `dsquant awq`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dsquant.cli.fields import FieldsCommand
from dsquant.cli.job_steps import check_again, check_one_process, dry_run_option, run_and_show, show_plan
from dsquant.cli.process import dsquant_command, json_option, model_argument

if TYPE_CHECKING:
    from pydantic import BaseModel

    from dsquant.jobs.ranks import Ranks
    from dsquant.pipeline.result import Result
    from dsquant.recipes import Recipe
    from dsquant.reporting.progress import Report


def _models() -> "tuple[type[BaseModel], ...]":
    from dsquant.recipes import AwqOptions
    from dsquant.running import Again, Metrics, Push

    return AwqOptions, Again, Push, Metrics


class _AwqCommand(FieldsCommand):
    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the formats: to know them takes an import of torch, which no other help waits for."""
        from dsquant.formats.table import FORMATS

        with formatter.section("Formats"):
            formatter.write_dl(
                [(f"{name}:TYPE" if known.has_types else name, known.help) for name, known in FORMATS.items()]
            )


@click.command(cls=_AwqCommand, models=_models)
@model_argument
@dry_run_option
@json_option
@click.option(
    "--scales-from",
    type=click.Path(path_type=Path),
    help="Quantize under the scales and grids that this output of an earlier release recorded, without calibration; "
    "every other setting comes from there.",
)
@dsquant_command
def awq(dry_run: bool, as_json: bool, scales_from: Path | None, **options: Any) -> None:
    """Quantizes MODEL (a folder, a hub id, or tiny-r1) with AWQ and writes a checkpoint that engines load."""
    check_again(options)
    from dsquant.options import taken
    from dsquant.running import Again, Metrics, Push

    again, push, metrics = taken(Again, options), taken(Push, options), taken(Metrics, options)
    if scales_from is not None:
        _check_alone()
    recipe = _recipe(options)
    if scales_from is not None:
        check_one_process("--scales-from")
    if dry_run:
        show_plan(recipe, again, as_json)
        return

    def run(report: "Report", ranks: "Ranks") -> "Result":
        if scales_from is None:
            from dsquant.pipeline.job import run_job
            from dsquant.pipeline.push import run_and_push

            job = partial(run_job, recipe, again.resume, again.restart, report, ranks)
            return run_and_push(recipe, push.push_to, job, ranks)
        from dsquant.incremental.release import full_run

        return full_run(recipe.model, scales_from, recipe.output, again, report)

    run_and_show(run, metrics, as_json)


def _check_alone() -> None:
    """Refuses other settings with --scales-from, from where they all come."""
    context = click.get_current_context()
    metrics = ("metrics_file", "metrics_port", "metrics_address")
    allowed = ("model", "output", "scales_from", "resume", "restart", "as_json", *metrics)
    given = ParameterSource.COMMANDLINE
    others = [name for name in context.params if name not in allowed and context.get_parameter_source(name) == given]
    if others:
        name = others[0].replace("_", "-")
        raise click.UsageError(f"--scales-from takes every other setting from there; leave --{name} out")


def _recipe(options: dict[str, Any]) -> "Recipe":
    from dsquant.recipes import Recipe

    output, formats = options["output"], tuple(dict.fromkeys(options["to"] or ()))
    recipe = Recipe.checked(**options | {"output": output or ".", "to": formats or None})
    if not output and not formats:
        from dsquant.pipeline.inputs import resolved

        recipe = resolved(recipe)
    kind = recipe.to[0].replace(":", "-") if len(recipe.to) == 1 else "quantized"
    name = f"{recipe.model_name}-{kind}-{recipe.target_name or f'{recipe.bits}bit'}"
    return recipe if output else recipe.model_copy(update={"output": Path(name)})
