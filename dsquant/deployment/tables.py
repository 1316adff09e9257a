"""A forecast for people: tables, and a picture of where the bytes lie."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dsquant.deployment.facts import Range
from dsquant.deployment.forecast import Deployment, Forecast, MachineForecast
from dsquant.deployment.sizes import OutputSize
from dsquant.recipe import format_size

BAR_WIDTH = 44
COLORS = {"GPU": "green", "RAM": "yellow", "disk": "red"}


def forecast_tables(forecast: Forecast) -> Iterator[RenderableType]:
    """Everything that `dsquant plan` prints.

    Args:
        forecast: the forecast.

    Yields:
        What rich prints.
    """
    origin = "config.json alone" if forecast.from_config_alone else "headers"
    yield Text(
        f"{forecast.model}: {forecast.architecture}, from {origin}: {forecast.num_tensors:,} tensors, "
        f"{forecast.source_bytes:,} bytes ({_size(forecast.source_bytes)})"
    )
    yield _sizes_table(forecast)
    for note in (*forecast.refused, *forecast.notes):
        yield Text(f"Note: {note}.")
    yield _makings_table(forecast)
    for assumption in _assumptions(forecast):
        yield Text(f"  {assumption}")
    network = forecast.network
    yield Text(
        f"KV cache: {network.kv_values} values a token and layer, {network.kv_bytes_per_token:,} bytes a token in "
        f"BF16; {forecast.context:,} tokens take {_size(forecast.context * network.kv_bytes_per_token)}"
    )
    if len(forecast.machines) > 1:
        yield _overview_table(forecast)
        yield Text("Name your own with --gpu 4x24GiB --ram 64GiB --disk-read 7GB/s.")
    else:
        yield from _machine_tables(forecast, forecast.machines[0])
    yield Text("Decoding speed: bytes a token over bandwidth, times the share of it that was reached:")
    for fact in forecast.facts:
        yield Text(f"  {fact.name}: {fact.value.low:.0%} to {fact.value.high:.0%} ({fact.source})")


def _size(num_bytes: float) -> str:
    return format_size(num_bytes) if num_bytes < 2**40 else f"{num_bytes / 2**40:.2f} TiB"


def _range(values: Range) -> str:
    """Two significant digits; one number where both ends are the same."""
    low, high = (f"{value:.2g}" if value < 100 else f"{value:,.0f}" for value in (values.low, values.high))
    return low if low == high else f"{low} to {high}"


def _table(title: str, *headings: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < left else "right", overflow="fold", no_wrap=number == 0)
    return table


def _sizes_table(forecast: Forecast) -> Table:
    choices = [mtp for mtp in ("none", "keep", "quantize", "drop") if any(size.mtp == mtp for size in forecast.sizes)]
    heads = ["weight files" if mtp == "none" else f"--mtp {mtp}" for mtp in choices]
    table = _table("Sizes of the weight files, in bytes", "output", *heads, "without MTP")
    by_name: dict[str, dict[str, OutputSize]] = {}
    for size in forecast.sizes:
        by_name.setdefault(size.name, {})[size.mtp] = size
    for name, found in by_name.items():
        cells = [f"{found[mtp].num_bytes:,}" if mtp in found else "" for mtp in choices]
        smallest = found.get("drop") or next(iter(found.values()))
        table.add_row(name, *cells, _size(smallest.served_bytes))
    return table


def _makings_table(forecast: Forecast) -> Table:
    names = list(dict.fromkeys(stage.name for making in forecast.makings for stage in making.stages))
    table = _table("What making it takes", "output", "memory", "disk", *names, "together")
    for making in forecast.makings:
        hours = {stage.name: _duration(stage.hours) for stage in making.stages}
        stages = [hours.get(name, "") for name in names]
        table.add_row(
            making.output.name, _size(making.memory_bytes), _size(making.disk_bytes), *stages, _duration(making.hours)
        )
    return table


def _duration(hours: Range) -> str:
    """In the unit that suits it."""
    for unit, factor in (("h", 1), ("min", 60)):
        if hours.high * factor >= 1:
            return f"{_range(hours * factor)} {unit}"
    return f"{_range(hours * 3600)} s"


def _assumptions(forecast: Forecast) -> Iterator[str]:
    stages = {stage.name: stage.assumption for making in forecast.makings for stage in making.stages}
    yield from (f"{name}: {assumption}" for name, assumption in stages.items())
    on_gpu = next((making.search_on_gpu for making in forecast.makings if making.search_on_gpu), None)
    if on_gpu is not None:
        yield f"{on_gpu.name}: {_duration(on_gpu.hours)} instead of the search above ({on_gpu.assumption})"
    yield f"memory: {forecast.makings[0].memory_assumption}"
    yield f"disk: {forecast.makings[0].disk_assumption}"


def _overview_table(forecast: Forecast) -> Table:
    table = _table("What runs where", "machine", "best that fits", "where", "tokens/s", "engines", left=3)
    for found in forecast.machines:
        if found.best is None:
            table.add_row(str(found.machine), "nothing", "", "", "")
            continue
        placement = found.best.placement
        speed = _range(placement.tokens_per_s) if placement.tokens_per_s else ""
        engines = ", ".join(found.best.commands)
        table.add_row(str(found.machine), found.best.output.name, _where(found.best), speed, engines)
    return table


def _where(row: Deployment) -> str:
    placement = row.placement
    places = {"GPU": placement.gpu_bytes, "RAM": placement.ram_bytes, "disk": placement.disk_bytes}
    return ", ".join(f"{place} {_size(size)}" for place, size in places.items() if size)


def _machine_tables(forecast: Forecast, found: MachineForecast) -> Iterator[RenderableType]:
    machine = found.machine
    yield Text(f"Bandwidths: RAM {_speed(machine.ram_bandwidth)} ({machine.ram_source}); ", end="")
    if machine.gpus is not None:
        yield Text(f"each GPU {_speed(machine.gpus.bandwidth)} ({machine.gpus.source}); ", end="")
    yield Text(f"disk {_speed(machine.disk_read)} ({machine.disk_source})")
    priced = forecast.gpu_price is not None
    price = ("price a million tokens",) if priced else ()
    table = _table(f"On {machine}", "output", "loaded", "where", "tokens/s", *price, "tokens of context", "remark")
    for row in found.deployments:
        placement = row.placement
        speed = _range(placement.tokens_per_s) if placement.tokens_per_s else "no"
        cost = (_range(row.price_per_million) if row.price_per_million else "",) if priced else ()
        context = f"{placement.max_context:,}" if placement.max_context else ""
        table.add_row(
            row.output.name, _size(row.output.served_bytes), _where(row), speed, *cost, context, placement.reason
        )
    yield table
    for sentence in found.statements:
        yield Text(sentence)
    if found.best is not None:
        yield from _best(found.best, found)


def _best(best: Deployment, found: MachineForecast) -> Iterator[RenderableType]:
    yield Text(f"\nBest that runs here: {best.output.name}")
    yield Text("  where its bytes lie:")
    placement, machine = best.placement, found.machine
    places = {
        "GPU": (placement.gpu_bytes + (placement.kv_bytes if placement.gpu_bytes else 0), machine.gpu_bytes),
        "RAM": (placement.ram_bytes + (0 if placement.gpu_bytes else placement.kv_bytes), machine.ram_bytes),
        "disk": (placement.disk_bytes, machine.disk_bytes or 0),
    }
    largest = max(max(used, room) for used, room in places.values())
    for place, (used, room) in places.items():
        yield _bar(place, used, room, largest, COLORS[place])
    yield Text("  what they are:")
    whole = max(best.output.by_kind.values())
    for kind, size in best.output.by_kind.items():
        yield _bar(kind, size, 0, whole, "cyan")
    for engine, command in best.commands.items():
        yield Text(f"  {engine}: {command}", overflow="fold", no_wrap=True)


def _bar(name: str, used: int, room: int, largest: int, color: str) -> Text:
    """A bar of the used bytes in front of the free ones."""
    filled = round(BAR_WIDTH * used / largest) if largest else 0
    if used and not filled:
        filled = 1
    free = max(0, round(BAR_WIDTH * room / largest) - filled) if largest else 0
    size = f"{_size(used)} of {_size(room)}" if room else _size(used)
    text = Text(f"    {name:15} ")
    text.append("█" * filled, style=color)
    text.append("░" * free, style="dim")
    text.append(" " * (BAR_WIDTH - filled - free) + f" {size}")
    return text


def _speed(values: Range) -> str:
    low, high = values.low / 1e9, values.high / 1e9
    return f"{low:,.3g} GB/s" if low == high else f"{low:,.4g} to {high:,.4g} GB/s"
