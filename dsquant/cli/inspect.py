"""The command `dsquant inspect`."""

import json

import click

from dsquant.cli.process import dsquant_command, model_argument
from dsquant.escaping import printable


@click.command()
@model_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@dsquant_command
def inspect(model: str, as_json: bool) -> None:
    """Describes MODEL from its headers alone."""
    from dsquant.deployment.inspection import describe

    found = describe(model)
    click.echo(json.dumps(vars(found), indent=2) if as_json else printable(str(found)))
