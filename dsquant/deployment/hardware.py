"""Parses a machine from the command line: `--gpu 4x24GiB --ram 64GiB --disk-read 7GB/s`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Self

from pydantic import Field, model_validator

from dsquant.deployment.facts import (
    CARDS,
    DEFAULT_DISK,
    DESKTOP_RAM,
    DESKTOP_RAM_GIB,
    GB,
    GIB,
    GPU_CLASSES,
    SERVER_RAM,
    UNIFIED_CLASSES,
    GpuClass,
    Range,
)
from dsquant.errors import UsageError
from dsquant.options import Options, Size, Spelling, format_size, parse_size

# Less than this is a typing error in the unit.
SMALLEST_MEMORY = 2**20
# A number without a unit up to this is read as GiB in the advice; a larger one may be a card's name, such as 3050.
LARGEST_BARE_NUMBER = 2000
# What a machine has beside its GPUs where --ram does not say it.
ASSUMED_RAM = "32GiB"
# More than any engine spreads one model over.
MOST_GPUS = 1024


DEFAULT_CONTEXT = 32768


class PlanOptions(Options):
    """The machine to plan for, and what is asked of it."""

    gpu: Annotated[str | None, Spelling(metavar="4x24GiB")] = Field(
        default=None, description="GPUs by memory, with their bandwidth if known, or by name: 4x24GiB@936GB/s, 2xH100."
    )
    ram: Annotated[str | None, Spelling(metavar="64GiB")] = Field(
        default=None, description="Memory, with its bandwidth if known: 64GiB@80GB/s."
    )
    unified_memory: Annotated[str | None, Spelling(metavar="512GiB")] = Field(
        default=None,
        description="Memory that processor and GPU share, as on Apple silicon, with its bandwidth if known: "
        "512GiB@819GB/s.",
    )
    disk: Annotated[str | None, Spelling(metavar="2TiB")] = Field(default=None, description="Room for the weights.")
    disk_read: Annotated[str | None, Spelling(metavar="7GB/s")] = Field(
        default=None, description="How fast the disk reads."
    )
    gpu_price: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Price of one GPU for an hour, in any currency."
    )
    context: int = Field(default=DEFAULT_CONTEXT, ge=1, description="Tokens of KV cache.")
    target_size: Size | None = Field(
        default=None,
        ge=1,
        description="Print the types of a GGUF file of this size, such as 131GiB: by a prior, where `dsquant gguf` "
        "measures.",
    )

    @model_validator(mode="after")
    def _one_kind_of_memory(self) -> Self:
        if self.unified_memory and (self.gpu or self.ram):
            raise ValueError("--unified-memory is all of a machine's memory; leave --gpu and --ram out")
        return self


@dataclass(frozen=True)
class Gpus:
    """Identical cards."""

    count: int
    memory_bytes: int
    """Memory of one card."""
    bandwidth: Range
    """Bytes a second of one card."""
    source: str
    """Source of the bandwidth."""


@dataclass(frozen=True)
class Machine:
    """The hardware that a model is to run on."""

    gpus: Gpus | None
    ram_bytes: int
    ram_bandwidth: Range
    ram_source: str
    disk_bytes: int | None
    """Space for the weights; None where it is not given."""
    disk_read: Range
    disk_source: str
    unified: bool = False
    """Whether processor and GPU share the memory, as on Apple silicon."""
    ram_assumed: bool = False
    """Whether nobody has said how much RAM there is."""
    here: bool = False
    """Whether it is the one that this process runs on."""

    @property
    def gpu_bytes(self) -> int:
        """Memory of all cards."""
        return self.gpus.count * self.gpus.memory_bytes if self.gpus else 0

    def __str__(self) -> str:
        cards = f"{self.gpus.count}x{self.gpus.memory_bytes / GIB:g} GiB GPU" if self.gpus else "no GPU"
        disk = f", disk {self.disk_bytes / GIB:g} GiB" if self.disk_bytes is not None else ""
        memory = f"{self.ram_bytes / GIB:g} GiB"
        ram = f"{memory} RAM{' (assumed)' if self.ram_assumed else ''}"
        return f"{memory} unified memory{disk}" if self.unified else f"{cards}, {ram}{disk}"


def parse_machine(gpu: str | None, ram: str | None, disk: str | None = None, disk_read: str | None = None) -> Machine:
    """Parses a machine's description; missing bandwidths are those of cards and memories of that size.

    `gpu` is `4x24GiB`, `4x24GiB@936GB/s` or `4x RTX 3090`, None for no GPU; `ram` is `64GiB` or `64GiB@80GB/s`, None
    for what an engine needs next to GPUs that hold everything; `disk` is space for the weights, such as `2TiB`;
    `disk_read` is `7GB/s`. Raises UsageError where one of them is not valid.
    """
    gpus = _parse_gpus(gpu) if gpu else None
    size, _, speed = (ram or ASSUMED_RAM).partition("@")
    ram_bytes = _memory("--ram", size, "64GiB")
    known = DESKTOP_RAM if ram_bytes <= DESKTOP_RAM_GIB * GIB else SERVER_RAM
    ram_bandwidth = parse_speed(speed) if speed else known.value * GB
    ram_source = "given" if speed else f"{known.name}: {known.source}"
    room = _parse_disk(disk, disk_read)
    return Machine(gpus, ram_bytes, ram_bandwidth, ram_source, *room, ram_assumed=ram is None)


def parse_unified(memory: str, disk: str | None = None, disk_read: str | None = None) -> Machine:
    """Parses a machine whose processor and GPU share `memory`, `512GiB` or `512GiB@819GB/s`; as `parse_machine`."""
    size, _, speed = memory.partition("@")
    num_bytes = _memory("--unified-memory", size, "512GiB")
    closest = _closest(UNIFIED_CLASSES, num_bytes)
    bandwidth = parse_speed(speed) if speed else closest.bandwidth_gbs * GB
    source = "given" if speed else f"Apple silicon of {closest.memory_gib} GB: {closest.cards}"
    return Machine(None, num_bytes, bandwidth, source, *_parse_disk(disk, disk_read), unified=True)


def this_machine(disk: str | None = None, disk_read: str | None = None) -> Machine:
    """Returns the machine that this process runs on: its memory, and its GPUs where PyTorch sees any that are alike."""
    import psutil

    ram = f"{psutil.virtual_memory().total // GIB or 1}GiB"
    found = parse_machine(_own_gpus(), ram, disk, disk_read)
    return replace(found, here=True)


def _own_gpus() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    if len({card.name for card in cards}) > 1:
        return None
    return f"{len(cards)}x{cards[0].name if _card(cards[0].name) else f'{round(cards[0].total_memory / GIB)}GiB'}"


def _parse_disk(disk: str | None, disk_read: str | None) -> tuple[int | None, Range, str]:
    """Returns the disk's room, speed, and the source of that."""
    num_bytes = _memory("--disk", disk, "2TiB") if disk else None
    if disk_read:
        return num_bytes, parse_speed(disk_read), "given"
    return num_bytes, DEFAULT_DISK.value * GB, DEFAULT_DISK.source


def _closest(classes: Sequence[GpuClass], num_bytes: int) -> GpuClass:
    return min(classes, key=lambda known: abs(known.memory_gib - num_bytes / GIB))


def _parse_gpus(text: str) -> Gpus:
    match = re.fullmatch(r"\s*(?:([0-9]+)\s*[xX×*]\s*)?([^@]+?)\s*(?:@(.+))?", text)
    if match is None or len(match[1] or "1") > len(str(MOST_GPUS)) or not 0 < int(match[1] or 1) <= MOST_GPUS:
        raise UsageError(
            f"--gpu {text!r}: write the number (at most {MOST_GPUS}) and memory of equal cards, such as 4x24GiB"
        )
    card = _card(match[2])
    if card is not None:
        name, memory_gib, gbs = card
        speed = parse_speed(match[3]) if match[3] else Range(gbs, gbs) * GB
        return Gpus(int(match[1] or 1), memory_gib * GIB, speed, "given" if match[3] else f"{name}'s data sheet")
    if not match[2][0].isdigit():
        raise UsageError(
            f"--gpu {text!r}: neither a size nor a known card ({', '.join(CARDS)}); write the number and memory of "
            "equal cards, such as 4x24GiB"
        )
    count = f"{match[1]}x" if match[1] else ""
    memory = _memory("--gpu", match[2], "24GiB", count)
    if match[3]:
        return Gpus(int(match[1] or 1), memory, parse_speed(match[3]), "given")
    closest = _closest(GPU_CLASSES, memory)
    source = f"cards of {closest.memory_gib} GB: {closest.cards}"
    return Gpus(int(match[1] or 1), memory, closest.bandwidth_gbs * GB, source)


def _card(text: str) -> tuple[str, int, float] | None:
    """Returns name, GiB and GB/s of a known card; its maker and series may be left out, and its memory may follow."""
    named = re.fullmatch(r"(.+?)(?:\s+([0-9]{1,4})\s?Gi?B)?", text, re.IGNORECASE)
    assert named is not None

    def key(name: str) -> str:
        return re.sub(r"nvidia|geforce|rtx|amd|[\s_-]", "", name.lower())

    found = ((name, *card) for name, card in CARDS.items() if key(name) == key(named[1]))
    return next(((name, int(named[2] or gib), gbs) for name, gib, gbs in found), None)


def _memory(option: str, text: str, example: str, count: str = "") -> int:
    """Parses a size with a unit: a bare number would be bytes, which nobody means. Memory is sold in powers of 1024."""
    number = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*", text)
    if number:
        suggested = f"{count}{number[1]}GiB" if float(number[1]) <= LARGEST_BARE_NUMBER else f"{count}{example}"
        raise UsageError(f"{option} {count}{text}: the size has no unit; write it as {suggested}")
    try:
        num_bytes = parse_size(text if option == "--disk" else re.sub(r"(?i)(?<=[KMGT])B", "iB", text))
    except UsageError as error:
        raise UsageError(f"{option} {count}{text}: not a size; write it as {count}{example}") from error
    if num_bytes < SMALLEST_MEMORY:
        raise UsageError(f"{option} {count}{text}: that is only {format_size(num_bytes)}; write it as {count}{example}")
    return num_bytes


def parse_speed(text: str) -> Range:
    """Parses a speed in MB/s, GB/s, GiB/s or TB/s (GB/s without a unit) into bytes a second, with equal bounds. Raises
    UsageError where it is not a speed."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([MGT])(i?)B?(?:/s|ps)?)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{text!r} is not a speed; write it as 7GB/s")
    power = "MGT".index((match[2] or "G").upper()) + 2
    value = float(match[1]) * (1024 if match[3] else 1000) ** power
    return Range(value, value)


# Common machines, for a plan that names none.
REFERENCE_MACHINES = (
    ("8x141GiB", "1TiB"),
    ("8x80GiB", "512GiB"),
    ("8x48GiB", "256GiB"),
    ("1x24GiB", "512GiB"),
    ("4x24GiB", "64GiB"),
)
REFERENCE_UNIFIED = "512GiB"
