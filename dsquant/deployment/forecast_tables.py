"""Lays out a forecast for people in 80 columns: the answer first, then a table for each question, sources last."""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dsquant.deployment.build_cost import BuildCost
from dsquant.deployment.facts import BEST, GIB, KL_OF_FEW_BITS, Range
from dsquant.deployment.hardware import Machine
from dsquant.deployment.sizes import OutputSize
from dsquant.deployment.types_by_prior import TypePlan
from dsquant.formats.safetensors_target import STOCK_WIDTHS
from dsquant.formats.table import FORMATS
from dsquant.options import format_size
from dsquant.precision.groups import WIDTH_COLUMNS
from dsquant.reporting.notebook import narrow_table

if TYPE_CHECKING:
    from dsquant.deployment.forecast import Deployment, Forecast, MachineForecast

BAR_WIDTH = 36
COMMAND_WIDTH = 76
COLORS = {"GPU": "green", "RAM": "yellow", "disk": "red"}


def forecast_tables(forecast: "Forecast") -> Iterator[RenderableType]:
    """Yields everything that `dsquant plan` prints."""
    origin = "config.json alone" if forecast.from_config_alone else "headers"
    yield Text(
        f"{forecast.model}: {forecast.architecture}, {forecast.num_tensors:,} tensors in "
        f"{_size(forecast.source_bytes)} (from {origin})\n"
    )
    if len(forecast.machines) > 1:
        yield from _overview(forecast)
    else:
        yield from _machine(forecast, forecast.machines[0])
    yield _sizes_table(forecast)
    yield _makings_table(forecast)
    if forecast.types is not None:
        yield from _types(forecast.types)
    network = forecast.network
    yield Text(
        f"KV cache: {network.kv_bytes_per_token:,} bytes a token in BF16; {forecast.context:,} tokens take "
        f"{_size(forecast.context * network.kv_bytes_per_token)}.\n"
    )
    yield from _notes(forecast)


def _types(types: TypePlan) -> Iterator[RenderableType]:
    table = _table(f"Types of a GGUF file of {_size(types.num_bytes)}, by a prior", *WIDTH_COLUMNS)
    for row in types.rows:
        table.add_row(*row)
    yield table
    yield Text(
        f"All together err {types.error:.2g} times as much as Q4_K would, by a prior of parts, layers and types taken "
        "from a small\nmodel and from what others measured on R1 (docs/decisions/0028). `dsquant gguf --target-size` "
        "measures instead.\n"
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else format_size(num_bytes)


def _unit(sizes: Iterable[int]) -> tuple[str, int]:
    """Returns one unit for a whole table."""
    return ("GiB", GIB) if max(sizes, default=0) >= GIB else ("MiB", 2**20)


def _range(values: Range) -> str:
    """Formats two significant digits; one number where both ends are the same."""
    low, high = (f"{value:.2g}" if value < 100 else f"{value:,.0f}" for value in (values.low, values.high))
    return low if low == high else f"{low} to {high}"


def _table(title: str, *headings: str, left: int = 1) -> Table:
    table = narrow_table(title, headings, left)
    table.columns[0].no_wrap = True
    return table


def _overview(forecast: "Forecast") -> Iterator[RenderableType]:
    table = _table("Best output for each machine", "machine", "output", "where", "tokens/s", left=3)
    made: dict[str, OutputSize] = {}
    for found in forecast.machines:
        if found.best is None:
            table.add_row(_short(found.machine), "nothing", "", "")
            continue
        placement, output = found.best.placement, found.best.output
        places = {"GPU": placement.gpu_bytes, "RAM": placement.ram_bytes, "disk": placement.disk_bytes}
        where = ", ".join(place for place, size in places.items() if size)
        speed = _range(placement.tokens_per_s) if placement.tokens_per_s else ""
        table.add_row(_short(found.machine), output.name, where, speed)
        made[output.name] = output
    yield table
    yield Text(f"{BEST}\n")
    yield Text("Describe a machine for commands to type: --gpu 4x24GiB --ram 64GiB,\nor --unified-memory 512GiB\n")
    for output in made.values():
        if output.command is not None:
            yield Text(f"To build {output.name}:")
            yield _command(output.command)
    yield Text("")


def _short(machine: Machine) -> str:
    if machine.unified:
        return f"Apple silicon, {machine.ram_bytes / GIB:g} GiB"
    cards = f"{machine.gpus.count}x{machine.gpus.memory_bytes / GIB:g} GiB" if machine.gpus else "no GPU"
    return f"{'here: ' if machine.here else ''}{cards}, {machine.ram_bytes / GIB:g} GiB RAM"


def _machine(forecast: "Forecast", found: "MachineForecast") -> Iterator[RenderableType]:
    if found.best is None:
        yield Text(f"Nothing runs on {found.machine}.\n")
    else:
        yield from _best(found.best, found)
        yield Text(f"{BEST}\n")
    runs = [row for row in found.deployments if row.placement.tokens_per_s is not None]
    if runs:
        yield _runs_table(found.machine, runs)
        yield from _remarks(runs)
    costs = [(row.output.name, row.price_per_million) for row in runs if row.price_per_million is not None]
    if costs:
        table = _table("Price of a million tokens", "output", "price")
        for name, price in costs:
            table.add_row(name, _range(price))
        yield table
    table = _table("What does not run there", "output", "why", left=2)
    for row in found.deployments:
        if row.placement.tokens_per_s is None:
            table.add_row(row.output.name, row.placement.reason)
    if table.rows:
        yield table
    for sentence in found.statements:
        yield Text(f"{sentence}\n")


def _runs_table(machine: Machine, runs: "list[Deployment]") -> Table:
    unit, factor = _unit(row.output.served_bytes for row in runs)
    headings = ("output", "loaded", "GPU", "RAM", "disk", "tokens/s", "context")
    rows = []
    for row in runs:
        placement = row.placement
        places = (placement.gpu_bytes, placement.ram_bytes, placement.disk_bytes)
        sizes = [f"{size / factor:,.1f}" if size else "" for size in (row.output.served_bytes, *places)]
        speed = _range(placement.tokens_per_s) if placement.tokens_per_s else ""
        context = f"{placement.max_context:,}" if placement.max_context else ""
        rows.append((row.output.name, *sizes, speed, context))
    kept = [at for at in range(len(headings)) if any(row[at] for row in rows)]  # no disk used, no column of it
    table = _table(f"On {machine} (sizes in {unit})", *(headings[at] for at in kept))
    for cells in rows:
        table.add_row(*(cells[at] for at in kept))
    return table


def _remarks(runs: "list[Deployment]") -> Iterator[Text]:
    """Yields what is tight, each once, with the outputs that it holds for."""
    alike: dict[str, list[str]] = {}
    for row in runs:
        if row.placement.reason and not row.placement.disk_bytes:
            alike.setdefault(row.placement.reason, []).append(row.output.name)
    yield from (Text(f"{', '.join(names)}: {reason}.\n") for reason, names in alike.items())


def _best(best: "Deployment", found: "MachineForecast") -> Iterator[RenderableType]:
    speed = f", {_range(best.placement.tokens_per_s)} tokens/s" if best.placement.tokens_per_s else ""
    yield Text(f"Best that runs here: {best.output.name}{speed}", style="bold")
    if best.output.command is not None:
        yield Text("build it:")
        yield _command(best.output.command)
    for engine, command in best.commands.items():
        yield Text(f"serve it with {engine}:")
        yield _command(command)
    yield Text("\nWhere its bytes are:")
    placement, machine = best.placement, found.machine
    places = {
        "GPU": (placement.gpu_bytes + (placement.kv_bytes if placement.gpu_bytes else 0), machine.gpu_bytes),
        "RAM": (placement.ram_bytes + (0 if placement.gpu_bytes else placement.kv_bytes), machine.ram_bytes),
        "disk": (placement.disk_bytes, machine.disk_bytes or 0),
    }
    largest = max(max(used, room) for used, room in places.values())
    for place, (used, room) in places.items():
        yield _bar(place, used, room, largest, COLORS[place])
    yield Text("What they are:")
    whole = max(best.output.by_kind.values())
    for kind, size in best.output.by_kind.items():
        yield _bar(kind, size, 0, whole, "cyan")
    yield Text("")


def _command(command: str) -> Text:
    """Formats a command to copy, its options on separate lines where it is long."""
    lines: list[str] = []
    for part in re.split(r" (?=--?[a-z])", command):
        if lines and len(lines[-1]) + len(part) < COMMAND_WIDTH - 4:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return Text("  " + " \\\n    ".join(lines), no_wrap=True, overflow="ignore", style="cyan")


def _bar(name: str, used: int, room: int, largest: int, color: str) -> Text:
    """Draws a bar of the used bytes, followed by the free ones."""
    filled = round(BAR_WIDTH * used / largest) if largest else 0
    if used and not filled:
        filled = 1
    free = max(0, round(BAR_WIDTH * room / largest) - filled) if largest else 0
    size = f"{_size(used)} of {_size(room)}" if room else _size(used)
    text = Text(f"  {name:15} ")
    text.append("█" * filled, style=color)
    text.append("░" * free, style="dim")
    text.append(" " * (BAR_WIDTH - filled - free) + f" {size}")
    return text


def _sizes_table(forecast: "Forecast") -> Table:
    """Rows for the widths that all engines take, the types that are placed on machines, and what else has a measured
    divergence; JSON has all."""
    choices = [mtp for mtp in ("none", "keep", "quantize", "drop") if any(size.mtp == mtp for size in forecast.sizes)]
    heads = ["files" if mtp == "none" else f"MTP {mtp}" for mtp in choices]
    unit, factor = _unit(size.num_bytes for size in forecast.sizes)
    mtp = "" if choices == ["none"] else " by --mtp; loaded: without MTP"
    table = _table(f"Sizes of the weight files in {unit}{mtp}", "output", *heads, "loaded")
    by_name: dict[str, dict[str, OutputSize]] = {}
    for size in forecast.sizes:
        by_name.setdefault(size.name, {})[size.mtp] = size
    usual = {name: found for name, found in by_name.items() if _is_usual(next(iter(found.values())))}
    for name, found in usual.items():
        cells = [f"{found[mtp].num_bytes / factor:,.1f}" if mtp in found else "" for mtp in choices]
        smallest = found.get("drop") or next(iter(found.values()))
        table.add_row(name, *cells, f"{smallest.served_bytes / factor:,.1f}")
    table.caption = f"{len(by_name) - len(usual)} more widths and types: dsquant plan MODEL --json"
    return table


def _is_usual(size: OutputSize) -> bool:
    name, _, type_name = size.format.partition(":")
    usual = size.bits in (None, *STOCK_WIDTHS) and (not type_name or type_name in FORMATS[name].placed)
    return usual or size.name in KL_OF_FEW_BITS


def _makings_table(forecast: "Forecast") -> Table:
    """One row for outputs that cost the same; the disk is what the largest of them takes."""
    unit, factor = _unit(making.disk_bytes for making in forecast.makings)
    table = _table(f"Cost of building it (sizes in {unit})", "output", "memory", "disk", "time", "on a GPU")
    alike: dict[tuple[str, ...], list[BuildCost]] = {}
    for making in forecast.makings:
        on_gpu = _duration(making.hours_on_gpu) if making.hours_on_gpu else "not measured"
        cost = (f"{making.memory_bytes / factor:,.1f}", _duration(making.hours), on_gpu)
        alike.setdefault(cost, []).append(making)
    for (memory, time, on_gpu), some in alike.items():
        others = f" and {len(some) - 1} more" if len(some) > 1 else ""
        disk = f"{max(making.disk_bytes for making in some) / factor:,.1f}"
        table.add_row(f"{some[0].output.name}{others}", memory, disk, time, on_gpu)
    return table


def _duration(hours: Range) -> str:
    """Formats hours in a suitable unit."""
    for unit, factor in (("h", 1), ("min", 60)):
        if hours.high * factor >= 1:
            return f"{_range(hours * factor)} {unit}"
    return f"{_range(hours * 3600)} s"


def _notes(forecast: "Forecast") -> Iterator[Text]:
    yield Text("Notes and sources", style="bold")
    for note in (*forecast.refused, *forecast.notes, *_assumptions(forecast.makings), *_speeds(forecast)):
        yield Text(f"- {note}")


def _assumptions(makings: tuple[BuildCost, ...]) -> Iterator[str]:
    stages: dict[str, list[Range]] = {}
    words = {stage.name: stage.assumption for making in makings for stage in making.stages}
    for making in makings:
        for stage in making.stages:
            stages.setdefault(stage.name, []).append(stage.hours)
    for name, hours in stages.items():
        whole = Range(min(one.low for one in hours), max(one.high for one in hours))
        yield f"{name}, {_duration(whole)}: {words[name]}"
    for is_gguf in (False, True):
        some = [making for making in makings if ("store" in {stage.name for stage in making.stages}) == is_gguf]
        on_gpu = [one for making in some for one in (making.search_on_gpu, making.evaluate_on_gpu) if one]
        words = {one.name: f"{_duration(one.hours)} ({one.assumption})" for one in on_gpu}
        where = "GGUF" if is_gguf else "other formats"
        evaluated = ", and evaluation on the CPU as above (--no-evaluate leaves it out)" if is_gguf else ""
        if words:
            told = "; ".join(f"{name} {found}" for name, found in words.items())
            yield f"{where}, instead of all of these: {told}{evaluated}"
    if makings:
        yield f"memory: {makings[0].memory_assumption}"
        yield f"disk: {makings[0].disk_assumption}"


def _speeds(forecast: "Forecast") -> Iterator[str]:
    if len(forecast.machines) == 1:
        machine = forecast.machines[0].machine
        assumed = f"{_size(machine.ram_bytes)} are assumed, --ram says what there is; " if machine.ram_assumed else ""
        yield f"RAM: {assumed}{_speed(machine.ram_bandwidth)} ({machine.ram_source})"
        if machine.gpus is not None:
            yield f"each GPU: {_speed(machine.gpus.bandwidth)} ({machine.gpus.source})"
        yield f"disk: {_speed(machine.disk_read)} ({machine.disk_source})"
    yield "tokens/s: bandwidth over the bytes of a token, times the share of it that engines reach:"
    yield from (
        f"{fact.name}: {fact.value.low:.0%} to {fact.value.high:.0%} ({fact.source})" for fact in forecast.facts
    )


def _speed(values: Range) -> str:
    low, high = values.low / 1e9, values.high / 1e9
    if low == high:
        return f"{low:,.0f} GB/s" if low >= 100 else f"{low:.3g} GB/s"
    return f"{low:,.4g} to {high:,.4g} GB/s"
