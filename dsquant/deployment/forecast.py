"""Implements `dsquant plan`: sizes of every output, where each runs and how fast, its cost, and what is impossible."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dsquant.deployment import facts
from dsquant.deployment.build_cost import BuildCost, build_cost_of
from dsquant.deployment.engines import launch_commands
from dsquant.deployment.facts import Fact, Range
from dsquant.deployment.hardware import (
    DEFAULT_CONTEXT,
    REFERENCE_MACHINES,
    REFERENCE_UNIFIED,
    Machine,
    PlanOptions,
    parse_machine,
    parse_unified,
    this_machine,
)
from dsquant.deployment.placement import MachinePlacement, Network, network_of, place
from dsquant.deployment.sizes import PRESETS, SOURCE, OutputSize, output_sizes
from dsquant.deployment.statements import statements_about
from dsquant.deployment.subject import Subject, open_subject
from dsquant.deployment.types_by_prior import TypePlan, types_for
from dsquant.formats.table import FORMATS, SAFETENSORS
from dsquant.reporting.notebook import Shown

# Only these are placed on a machine, in the order in which one of them is called the best (`facts.BEST`). Widths that
# some engines do not take are not among them.
CANDIDATES = (
    SOURCE,
    *(
        f"{known.name} {preset}{bits}"
        for bits in (" 8-bit", "")
        for preset in PRESETS
        for known in sorted(SAFETENSORS.values(), key=lambda known: known.rank)
    ),
    *(f"{name}:{type_name}" for name, known in FORMATS.items() for type_name in known.placed),
)
# Below this, overheads and not bandwidth limit the speed.
SMALL_BYTES = 2**30
# Where experts come from disk.
FOR_DISK = tuple(f"{name}:{type_name}" for name, known in FORMATS.items() for type_name in known.on_disk)
FOR_TRIALS = {f"{name}:{type_name}" for name, known in FORMATS.items() for type_name in known.for_trials}


@dataclass(frozen=True)
class Deployment:
    """One output on one machine."""

    output: OutputSize
    placement: MachinePlacement
    commands: dict[str, str]
    """Engine -> command."""
    price_per_million: Range | None
    """Of a million generated tokens, one sequence at a time; None where no price was given or nothing runs."""


@dataclass(frozen=True)
class MachineForecast:
    """Every candidate on one machine."""

    machine: Machine
    deployments: tuple[Deployment, ...]
    best: Deployment | None
    statements: tuple[str, ...]
    """What works and what does not, in words."""


@dataclass(frozen=True)
class Forecast(Shown):
    """Everything known of a model before a weight is read."""

    model: str
    architecture: str
    from_config_alone: bool
    num_tensors: int
    source_bytes: int
    network: Network
    context: int
    sizes: tuple[OutputSize, ...]
    refused: tuple[str, ...]
    """Outputs that cannot be built, and why."""
    notes: tuple[str, ...]
    makings: tuple[BuildCost, ...]
    machines: tuple[MachineForecast, ...]
    gpu_price: float | None
    facts: tuple[Fact, ...] = facts.EFFICIENCIES
    types: TypePlan | None = None
    """Of a GGUF file of the size that was asked for."""

    def as_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        named = {"machines": [_machine_json(found) for found in self.machines]}
        sizes = [{"name": size.name, **asdict(size), "served_bytes": size.served_bytes} for size in self.sizes]
        makings = [
            {
                **asdict(making),
                "output": making.output.name,
                "mtp": making.output.mtp,
                "hours": asdict(making.hours),
                "hours_on_gpu": asdict(making.hours_on_gpu) if making.hours_on_gpu else None,
            }
            for making in self.makings
        ]
        network = {**asdict(self.network), "kv_bytes_per_token": self.network.kv_bytes_per_token}
        plain = {key: value for key, value in vars(self).items() if key not in ("sizes", "makings", "machines")}
        plain["facts"] = [asdict(fact) for fact in self.facts]
        plain["types"] = asdict(self.types) if self.types else None
        return {**plain, "network": network, "sizes": sizes, "makings": makings, **named}

    def tables(self) -> Iterable[Any]:
        """Yields the tables of the command line."""
        from dsquant.deployment.forecast_tables import forecast_tables

        return forecast_tables(self)


def _machine_json(found: MachineForecast) -> dict[str, Any]:
    rows = [
        {**asdict(row), "output": row.output.name, "served_bytes": row.output.served_bytes} for row in found.deployments
    ]
    return {
        "machine": asdict(found.machine),
        "deployments": rows,
        "best": found.best.output.name if found.best else None,
        "statements": list(found.statements),
    }


def forecast(model: str, **options: Any) -> Forecast:
    """Plans everything about a model (`tiny-r1`, a folder, a config.json, or a hub id) from its headers or its config;
    without the options gpu, ram and unified_memory, for this machine and common ones.

    Raises InputError where the model cannot be found or is not supported, UsageError where the machine's description or
    another option is not valid.
    """
    asked = PlanOptions.checked(**options)
    if asked.unified_memory:
        machines = [parse_unified(asked.unified_memory, asked.disk, asked.disk_read)]
    elif asked.gpu or asked.ram:
        machines = [parse_machine(asked.gpu, asked.ram, asked.disk, asked.disk_read)]
    else:
        machines = [this_machine(asked.disk, asked.disk_read), *reference_machines(asked.disk, asked.disk_read)]
    subject = open_subject(model)
    found = forecast_of(subject, output_sizes(subject), machines, asked.gpu_price, asked.context)
    return replace(found, types=types_for(subject, asked.target_size)) if asked.target_size else found


def forecast_of(
    subject: Subject,
    outputs: tuple[tuple[OutputSize, ...], tuple[str, ...]],
    machines: Sequence[Machine],
    gpu_price: float | None = None,
    context: int = DEFAULT_CONTEXT,
) -> Forecast:
    """Plans everything but the sizes, which come from `output_sizes`.

    `gpu_price` is that of one GPU for an hour; `context` is limited to the model's own.
    """
    sizes, refused = outputs
    config = subject.skeleton.config
    limit = min(context, int(config.get("max_position_embeddings") or context))
    planned = Forecast(
        model=subject.model,
        architecture=subject.checkpoint.architecture,
        from_config_alone=not subject.has_headers,
        num_tensors=len(subject.checkpoint.index),
        source_bytes=subject.source_bytes,
        network=network_of(config),
        context=limit,
        sizes=sizes,
        refused=refused,
        notes=(*([f"the model's context is {limit:,} tokens"] if limit < context else []), *_notes(subject)),
        makings=tuple(build_cost_of(size, subject, machines[0]) for size in _candidates(sizes)[1:]),
        machines=(),
        gpu_price=gpu_price,
    )
    return replace(planned, machines=tuple(_on_machine(planned, subject, machine) for machine in machines))


def reference_machines(disk: str | None = None, disk_read: str | None = None) -> list[Machine]:
    """Returns the machines of a plan that names none."""
    machines = [parse_machine(gpu, ram, disk, disk_read) for gpu, ram in REFERENCE_MACHINES]
    return [*machines, parse_unified(REFERENCE_UNIFIED, disk, disk_read)]


def _candidates(sizes: Sequence[OutputSize]) -> list[OutputSize]:
    """Returns one output of each name as its command builds it by default: with the MTP layer, except for GGUF."""
    by_name: dict[str, OutputSize] = {}
    for size in sizes:
        by_name.setdefault(size.name, size)
    return [by_name[name] for name in CANDIDATES if name in by_name]


def _notes(subject: Subject) -> tuple[str, ...]:
    notes = list(subject.checkpoint.notes)
    if not subject.has_headers:
        notes.append(
            "from config.json alone: sizes of tensor data are exact; safetensors files differ by the order of names in "
            "their headers, a few kilobytes in all"
        )
    if not subject.has_tokenizer:
        notes.append("no tokenizer.json: GGUF sizes are those of the tensors; the file's header adds the vocabulary")
    if subject.source_bytes < SMALL_BYTES:
        notes.append("a model this small is limited by overheads: its tokens/s are bounds that are not reached")
    notes += [facts.PRESET_BEST, facts.TARGETS, facts.FEW_BITS]
    notes.append("tokenizer, config, model card and dsquant.json add a few megabytes to the weight files")
    return tuple(notes)


def _on_machine(planned: Forecast, subject: Subject, machine: Machine) -> MachineForecast:
    rows, network = [], planned.network
    for size in _candidates(planned.sizes):
        placement = place(size, network, machine, planned.context)
        commands = launch_commands(size, network, machine, placement, subject)
        rows.append(Deployment(size, placement, commands, _price(placement, machine, planned.gpu_price)))
    best = min((row for row in rows if row.commands), key=_rank, default=None)
    statements = statements_about(machine, network, [(row.output, row.placement) for row in rows])
    return MachineForecast(machine, tuple(rows), best, statements)


def _rank(row: Deployment) -> tuple[int, int]:
    """Orders outputs as `facts.BEST` says."""
    name, order = row.output.name, CANDIDATES.index(row.output.name)
    if row.placement.disk_bytes:
        return 3, FOR_DISK.index(name) if name in FOR_DISK else len(FOR_DISK) + order
    if name in FOR_TRIALS:
        return 2, order
    return (0 if row.placement.kind in ("gpu", "unified") else 1), order


def _price(placement: MachinePlacement, machine: Machine, gpu_price: float | None) -> Range | None:
    if gpu_price is None or placement.tokens_per_s is None or machine.gpus is None:
        return None
    an_hour = gpu_price * machine.gpus.count
    speed = placement.tokens_per_s
    return Range(an_hour / 3600 / speed.high * 1e6, an_hour / 3600 / speed.low * 1e6)
