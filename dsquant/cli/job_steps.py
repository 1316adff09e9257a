"""Options and steps of the commands that run a job."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from dsquant.cli.process import echo_json, reporting
from dsquant.errors import UsageError
from dsquant.escaping import printable
from dsquant.jobs.launcher import several_ranks

if TYPE_CHECKING:
    from dsquant.jobs.ranks import Ranks
    from dsquant.pipeline.result import Result
    from dsquant.recipes import Recipe
    from dsquant.reporting.notebook import Shown
    from dsquant.reporting.progress import Report
    from dsquant.running import Again, Metrics

dry_run_option = click.option("--dry-run", is_flag=True, help="Validate everything, print the plan, write nothing.")


def check_again(options: Mapping[str, Any]) -> None:
    """Refuses --resume together with --restart."""
    if options["resume"] and options["restart"]:
        raise click.UsageError("--resume and --restart exclude each other")


def check_one_process(option: str) -> None:
    """Refuses an option of a job that several ranks share."""
    if several_ranks():
        raise UsageError(f"{option} runs in one process; start it without a launcher")


def run_and_show(run: "Callable[[Report, Ranks], Result]", metrics: "Metrics", as_json: bool) -> None:
    """Runs a job on all ranks that a launcher has started, and prints on the first what it did."""
    from dsquant.jobs.ranks import joined

    with joined() as ranks, reporting(not as_json, metrics, ranks.first) as report:
        result = run(report, ranks)
    if ranks.first:
        show_result(result, as_json)


def show_plan(recipe: "Recipe", again: "Again", as_json: bool) -> None:
    """Prints what a job would do."""
    check_one_process("--dry-run")
    from dsquant.pipeline.job import preview

    plan = preview(recipe, again.resume, again.restart)
    if as_json:
        echo_json(plan)
    else:
        click.echo(printable(str(plan)))


def show_result(result: "Shown", as_json: bool) -> None:
    """Prints a result as JSON, or as tables."""
    from dsquant.reporting.terminal import print_result

    if as_json:
        echo_json(result)
    else:
        print_result(result)
