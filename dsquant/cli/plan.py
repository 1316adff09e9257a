"""The command `dsquant plan`."""

import json

import click

from dsquant.cli.process import dsquant_command, quiet_libraries


@click.command()
@click.argument("model", default="tiny-r1", metavar="[MODEL=tiny-r1]")
@click.option("--gpu", metavar="4x24GiB", help="GPUs, with their bandwidth if known: 4x24GiB@936GB/s.")
@click.option("--ram", metavar="64GiB", help="Memory, with its bandwidth if known: 64GiB@80GB/s.")
@click.option("--disk", metavar="2TiB", help="Room for the weights.")
@click.option("--disk-read", metavar="7GB/s", help="How fast the disk reads.")
@click.option("--gpu-price", type=click.FloatRange(min=0), help="Price of one GPU for an hour, in any currency.")
@click.option("--context", type=click.IntRange(1), default=32768, show_default=True, help="Tokens of KV cache.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@dsquant_command
def plan(
    model: str,
    gpu: str | None,
    ram: str | None,
    disk: str | None,
    disk_read: str | None,
    gpu_price: float | None,
    context: int,
    as_json: bool,
) -> None:
    """Says what MODEL becomes in every format, what runs where, how fast and for how much, before a weight is read.

    MODEL is tiny-r1, a folder, a hub id (its headers are fetched, no weights), or a config.json.
    """
    with quiet_libraries():
        from dsquant.deployment.forecast import forecast

        found = forecast(model, gpu, ram, disk, disk_read, gpu_price, context)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
        return
    from dsquant.deployment.forecast_tables import forecast_tables
    from dsquant.reporting.notebook import plain_console

    console = plain_console()
    for renderable in forecast_tables(found):
        console.print(renderable, crop=False)  # a command is copied whole
