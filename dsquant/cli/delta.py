"""The command `dsquant delta`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsquant.cli.fields import FieldsCommand
from dsquant.cli.job_steps import check_again, show_result
from dsquant.cli.process import dsquant_command, json_option, reporting

if TYPE_CHECKING:
    from pydantic import BaseModel

    from dsquant.reporting.notebook import Shown


def _models() -> "tuple[type[BaseModel], ...]":
    from dsquant.running import DeltaOptions, Metrics

    return DeltaOptions, Metrics


@click.command(cls=FieldsCommand, models=_models, own_first=True)
@click.argument("releases", nargs=-1, metavar="OLD NEW")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder to create.")
@click.option("--apply", "apply_", type=click.Path(path_type=Path), help="Apply this patch to the output OLD instead.")
@json_option
@dsquant_command
def delta(releases: tuple[str, ...], output: Path, apply_: Path | None, as_json: bool, **options: Any) -> None:
    """Creates the output of release NEW from that of release OLD: what changed is quantized under the recorded scales,
    the rest is reused; and a patch from the one output to the other.

    \b
    dsquant delta OLD NEW --output DIR
    dsquant delta --apply PATCH OLD_OUTPUT --output DIR
    """
    if len(releases) != (1 if apply_ else 2):
        raise click.UsageError("name OLD and NEW; with --apply PATCH the old output alone")
    if apply_ and any(map(options.get, ("quantized", "patch", "resume", "restart"))):
        raise click.UsageError("--apply PATCH takes --output and nothing of --quantized, --patch, --resume, --restart")
    check_again(options)
    from dsquant.options import taken
    from dsquant.running import DeltaOptions, Metrics

    asked, metrics = taken(DeltaOptions, options), taken(Metrics, options)
    from dsquant.incremental import release

    with reporting(not as_json, metrics) as report:
        done: Shown
        if apply_:
            done = release.apply(apply_, Path(releases[0]), output, report)
        else:
            done = release.delta(releases[0], releases[1], output, asked, report)
    show_result(done, as_json)
