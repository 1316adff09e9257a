"""The command `dsquant verify`."""

import sys
from pathlib import Path

import click

from dsquant.cli.job_steps import show_result
from dsquant.cli.process import dsquant_command, quiet_libraries
from dsquant.errors import InconclusiveError, InputError


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--source", help="The model that DIR was created from.  [default: the recorded one, where it is here]")
@click.option("--all", "everything", is_flag=True, help="Compare every parameter with the source, not a sample.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON, and no progress bar.")
@dsquant_command
def verify(folder: Path, source: str | None, everything: bool, as_json: bool) -> None:
    """Checks every byte of DIR, an output or what `dsquant run` published, its coverage of the source, and its values;
    exit code 3 on damage, 5 where a check could not be run."""
    try:
        from dsquant.jobs.ranks import joined
        from dsquant.reporting.terminal import progress_bar
        from dsquant.verification.release_checks import verify as check
    except ImportError as error:
        raise InconclusiveError(f"{folder} was not checked: a package cannot be imported: {error}") from error

    with joined() as ranks, quiet_libraries(), progress_bar(not as_json and ranks.first) as report:
        found = check(folder, source, everything, report, ranks)
    if ranks.first:
        show_result(found, as_json)
    if not found.ok:
        sys.exit(InputError.exit_code if found.findings else InconclusiveError.exit_code)
