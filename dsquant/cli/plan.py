"""The command `dsquant plan`."""

from typing import TYPE_CHECKING, Any

import click

from dsquant.cli.fields import FieldsCommand
from dsquant.cli.process import dsquant_command, echo_json, model_argument, quiet_libraries
from dsquant.deployment.facts import BEST

if TYPE_CHECKING:
    from pydantic import BaseModel


def _models() -> "tuple[type[BaseModel], ...]":
    from dsquant.deployment.hardware import PlanOptions

    return (PlanOptions,)


@click.command(cls=FieldsCommand, models=_models, epilog=BEST)
@model_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@dsquant_command
def plan(model: str, as_json: bool, **options: Any) -> None:
    """Says what MODEL becomes in every format, what runs where, how fast and for how much, before a weight is read.

    MODEL is tiny-r1, a folder, a hub id (its headers are fetched, no weights), or a config.json.
    """
    with quiet_libraries():
        from dsquant.deployment.forecast import forecast

        found = forecast(model, **options)
    if as_json:
        echo_json(found)
        return
    from dsquant.deployment.forecast_tables import forecast_tables
    from dsquant.reporting.notebook import plain_console

    console = plain_console()
    for renderable in forecast_tables(found):
        console.print(renderable, crop=False)  # a command is copied whole
