"""The command `dsquant gguf`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsquant.cli.fields import FieldsCommand
from dsquant.cli.job_steps import check_again, dry_run_option, run_and_show, show_plan
from dsquant.cli.process import dsquant_command, json_option, model_argument

if TYPE_CHECKING:
    from pydantic import BaseModel

    from dsquant.jobs.ranks import Ranks
    from dsquant.pipeline.result import Result
    from dsquant.recipes import Recipe
    from dsquant.reporting.progress import Report


def _models() -> "tuple[type[BaseModel], ...]":
    from dsquant.recipes import GgufOptions
    from dsquant.running import Again, Metrics, Push

    return GgufOptions, Again, Push, Metrics


@click.command(cls=FieldsCommand, models=_models)
@model_argument
@dry_run_option
@json_option
@dsquant_command
def gguf(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Converts MODEL (a folder, a hub id, or tiny-r1) to GGUF files that llama.cpp runs, straight from its shards."""
    check_again(options)
    from dsquant.options import taken
    from dsquant.running import Again, Metrics, Push

    again, push, metrics = taken(Again, options), taken(Push, options), taken(Metrics, options)
    recipe = _recipe(options)
    if dry_run:
        show_plan(recipe, again, as_json)
        return
    from dsquant.pipeline.job import run_job
    from dsquant.pipeline.push import run_and_push

    def run(report: "Report", ranks: "Ranks") -> "Result":
        job = partial(run_job, recipe, again.resume, again.restart, report, ranks)
        return run_and_push(recipe, push.push_to, job, ranks)

    run_and_show(run, metrics, as_json)


def _recipe(options: dict[str, Any]) -> "Recipe":
    from dsquant.recipes import gguf_recipe

    output, type_name = options["output"], options["type"].upper()
    recipe = gguf_recipe(**options | {"output": output or "."})
    name = f"{recipe.model_name}-{recipe.target_name or type_name}-GGUF"
    return recipe if output else recipe.model_copy(update={"output": Path(name)})
