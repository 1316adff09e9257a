"""What the commands share that run a job."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from dsquant.cli.process import echo_json
from dsquant.escaping import printable

if TYPE_CHECKING:
    from dsquant.pipeline.result import Result
    from dsquant.recipes import Recipe
    from dsquant.running import Again

dry_run_option = click.option("--dry-run", is_flag=True, help="Validate everything, print the plan, write nothing.")


def check_again(options: Mapping[str, Any]) -> None:
    """Refuses --resume together with --restart."""
    if options["resume"] and options["restart"]:
        raise click.UsageError("--resume and --restart exclude each other")


def show_plan(recipe: "Recipe", again: "Again", as_json: bool) -> None:
    """Prints what a job would do."""
    from dsquant.pipeline.job import preview

    plan = preview(recipe, again.resume, again.restart)
    if as_json:
        echo_json(plan)
    else:
        click.echo(printable(str(plan)))


def show_result(result: "Result", as_json: bool) -> None:
    """Prints what a job did."""
    from dsquant.reporting.terminal import print_result

    if as_json:
        echo_json(result)
    else:
        print_result(result)
