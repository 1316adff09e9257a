"""The command `dsquant delta`."""

import json
from pathlib import Path

import click

from dsquant.cli.process import dsquant_command, metrics_options, reporting


@click.command()
@click.argument("releases", nargs=-1, metavar="OLD NEW")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option(
    "--quantized",
    type=click.Path(path_type=Path),
    help="The output that was made from OLD.  [default: where `dsquant awq OLD` puts it; OLD itself may be the output]",
)
@click.option("--patch", type=click.Path(path_type=Path), help="Patch to write.  [default: OUTPUT.patch]")
@click.option("--apply", "apply_", type=click.Path(path_type=Path), help="Apply this patch to the output OLD instead.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted job in the output folder, or begin one.")
@click.option("--restart", is_flag=True, help="Begin anew where the output folder holds a job or a result of dsquant.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and no progress bar.")
@metrics_options
@dsquant_command
def delta(
    releases: tuple[str, ...],
    output: Path,
    quantized: Path | None,
    patch: Path | None,
    apply_: Path | None,
    resume: bool,
    restart: bool,
    as_json: bool,
    metrics_file: Path | None,
    metrics_port: int | None,
    metrics_address: str | None,
) -> None:
    """Makes the output of release NEW from that of release OLD: what changed is quantized under the recorded scales,
    the rest is reused; and a patch from the one output to the other.

    \b
    dsquant delta OLD NEW --output DIR
    dsquant delta --apply PATCH OLD_OUTPUT --output DIR
    """
    if len(releases) != (1 if apply_ else 2):
        raise click.UsageError("name OLD and NEW; with --apply PATCH the old output alone")
    if apply_ and (quantized or patch or resume or restart):
        raise click.UsageError("--apply PATCH takes --output and nothing of --quantized, --patch, --resume, --restart")
    if resume and restart:
        raise click.UsageError("--resume and --restart exclude each other")
    from dsquant.incremental import release
    from dsquant.reporting.notebook import plain_console

    with reporting(not as_json, metrics_file, metrics_port, metrics_address) as report:
        if apply_:
            applied = release.apply(apply_, Path(releases[0]), output, report)
        else:
            old, new = releases
            made = release.delta(old, new, output, quantized, patch, resume, restart, report)
    if as_json:
        click.echo(json.dumps((applied if apply_ else made).as_json(), indent=2))
    else:
        plain_console().print(*(applied if apply_ else made).tables(), sep="\n")
