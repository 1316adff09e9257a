"""Locates the damage in a file whose hash differs: the tensor, or the region that belongs to none.

The headers of safetensors and the tensor infos of GGUF files follow from the record of their tensors, so a damaged
header is compared with the right one, byte by byte.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from dsquant.errors import PackageError
from dsquant.files.foreign import LARGEST_TEXT_BYTES
from dsquant.files.sealing import Hashed, block_sizes, broken_sections
from dsquant.formats.gguf.files import ALIGNMENT, GgufTensor
from dsquant.formats.output_shards import Shard, ShardPlan, StoredTensor, index_content
from dsquant.formats.scales import SCALES_FILE
from dsquant.jobs.folder_state import RECORD_FILE
from dsquant.packages import load
from dsquant.source.shards import INDEX_FILE

GGUF_PREFIX = struct.Struct("<4sIQQ")
GGUF_VERSION = 3
# Tensors of a file that are read one after the other; parts of a file are read side by side.
PART_BYTES = 64 * 2**20

Damage = list[tuple[str, str]]
"""Place and problem of each damage in a file."""


class Readable(Protocol):
    """A file that is read from where it stands."""

    def read(self, num_bytes: int, /) -> bytes:
        """Reads the next bytes; fewer where the file ends."""


@dataclass(frozen=True)
class Region:
    """Consecutive bytes of a file."""

    where: str
    """A tensor's name in quotes, or another description of the bytes."""
    start: int
    num_bytes: int
    sha256: str | None
    """Expected hash; None for zeros."""


@dataclass(frozen=True)
class Part:
    """What is read of a file at a time: the whole, or regions of a file that consists of its header and tensors."""

    name: str
    """The file's path in the output folder."""
    num_bytes: int
    header: bytes = b""
    """Where the part begins with the file's header, as it should be."""
    regions: tuple[Region, ...] = ()


def parts_of(folder: Path, name: str, files: dict[str, dict[str, Any]]) -> list[Part]:
    """Returns the parts of a file, in its order, that together show whether each of its bytes is as recorded.

    Those of a safetensors file need no hash of the whole: its header follows from the record, and nothing is between
    its tensors.
    """
    path, entry = folder / name, files[name]
    size = path.stat().st_size
    if "tensors" not in entry or not _is_safetensors(path.name) or size != entry["bytes"]:
        return [Part(name, size)]
    shard = _shard(path.name, entry)
    regions = _regions(shard, entry)
    if len(shard.header) + sum(region.num_bytes for region in regions) != size:
        return [Part(name, size)]
    parts, some = list[Part](), list[Region]()
    header, taken = shard.header, len(shard.header)
    for region in regions:
        if some and taken + region.num_bytes > PART_BYTES:
            parts.append(Part(name, taken, header, tuple(some)))
            header, some, taken = b"", [], 0
        some.append(region)
        taken += region.num_bytes
    return [*parts, Part(name, taken, header, tuple(some))]


def damage_in(folder: Path, part: Part, files: dict[str, dict[str, Any]]) -> Damage:
    """Reads a part of a file once; returns place and problem of each damage in it."""
    if not part.header and not part.regions:
        return damaged_parts(folder, part.name, files)
    with (folder / part.name).open("rb", buffering=0) as file:
        found = _wrong_header(file, part.header, files[part.name]) if part.header else []
        file.seek(part.regions[0].start if part.regions else 0)
        return found + _wrong_regions(file, part.regions)


def damaged_parts(folder: Path, name: str, files: dict[str, dict[str, Any]]) -> Damage:
    """Reads a file once, and compares it and every tensor in it with the record.

    `name` is the file's path in the output folder, `files` the record's files. Returns place and problem of each
    damage.
    """
    path, entry = folder / name, files[name]
    with path.open("rb", buffering=0) as file:
        hashed = Hashed(file)
        wrong = _wrong_tensors(hashed, path.name, entry)
        seal = hashed.rest()
    if seal == {key: entry[key] for key in seal}:
        return wrong
    if seal["bytes"] != entry["bytes"]:
        return [("size", f"{seal['bytes']} bytes, {entry['bytes']} were written"), *wrong]
    return wrong or _named(path, name, files)


def _named(path: Path, name: str, files: dict[str, dict[str, Any]]) -> Damage:
    """Locates the damage of a file that has its size, and no damaged tensor."""
    rest = "keys" if name.endswith(".gguf") else "content"  # a GGUF file's keys are not in the record
    wrong: Damage = []
    if path.stat().st_size > LARGEST_TEXT_BYTES:
        return [(rest, "differs from what was written")]
    if PurePosixPath(name).name == INDEX_FILE:
        wrong = _wrong_lines(path, index_content(recorded_shards(files, PurePosixPath(name).parent)))
    if not wrong and PurePosixPath(name).name == RECORD_FILE:
        wrong = [(part, "the record is damaged") for part in broken_sections(path.read_bytes())]
    if not wrong and name.endswith(".json"):
        wrong = _no_json(path)
    return wrong or [(rest, "differs from what was written")]


def recorded_shards(files: dict[str, dict[str, Any]], folder: PurePosixPath) -> ShardPlan:
    """Returns the safetensors files of a folder inside the output as the record lists them."""
    names = [PurePosixPath(name) for name in files if name.endswith(".safetensors")]
    return ShardPlan(tuple(_shard(name.name, files[str(name)]) for name in names if name.parent == folder))


def _shard(file_name: str, entry: dict[str, Any]) -> Shard:
    tensors = (StoredTensor(name, dtype, tuple(shape)) for name, (dtype, _, *shape) in entry["tensors"].items())
    return Shard(file_name, "", tuple(tensors), entry.get("metadata", "pt"))


def _wrong_tensors(file: Hashed, name: str, entry: dict[str, Any]) -> Damage:
    """Compares a file of tensors with the record of each, and of the bytes between them."""
    if "tensors" not in entry:
        return []
    if name.endswith(".gguf"):
        return _wrong_in_gguf(file, entry)
    if _is_safetensors(name):
        shard = _shard(name, entry)
        return _wrong_header(file, shard.header, entry) + _wrong_regions(file, _regions(shard, entry))
    return []


def _is_safetensors(name: str) -> bool:
    return name.endswith(".safetensors") or name == SCALES_FILE


def _wrong_header(file: Readable, wanted: bytes, entry: dict[str, Any]) -> Damage:
    place = _first_difference(file.read(len(wanted)), wanted)
    return [] if place is None else [_in_header(wanted, place, entry["tensors"])]


def _regions(shard: Shard, entry: dict[str, Any]) -> list[Region]:
    regions, start = [], len(shard.header)
    for tensor in shard.tensors:
        regions.append(Region(repr(tensor.name), start, tensor.num_bytes, entry["tensors"][tensor.name][1]))
        start += tensor.num_bytes
    return regions


def _in_header(header: bytes, place: int, tensors: Iterable[str]) -> tuple[str, str]:
    problem = f"byte {place} of the file's header"
    if place < 8:
        return "header length", problem
    starts = {name: header.index(f"{json.dumps(name)}:".encode()) for name in tensors}
    before = [name for name, start in starts.items() if start <= place]
    if not before:
        return "header metadata", problem
    if place >= len(header.rstrip(b" ")) - 1:
        return "header padding", problem
    return f"header entry of {before[-1]!r}", problem


def _wrong_in_gguf(file: Hashed, entry: dict[str, Any]) -> Damage:
    tensors = [GgufTensor(name, dtype, tuple(shape)) for name, (dtype, _, *shape) in entry["tensors"].items()]
    sizes = {tensor.name: tensor.num_bytes for tensor in tensors}
    padded = {name: size + -size % ALIGNMENT for name, size in sizes.items()}
    header_bytes = entry["bytes"] - sum(padded.values())
    if not 0 <= header_bytes <= LARGEST_TEXT_BYTES:
        return [("header", f"{header_bytes} bytes are left for it besides the recorded tensors")]
    found = _wrong_in_gguf_header(file.read(header_bytes), tensors, padded)
    regions, start = [], header_bytes
    for name, size in sizes.items():
        regions.append(Region(repr(name), start, size, entry["tensors"][name][1]))
        regions.append(Region(f"padding after {name!r}", start + size, padded[name] - size, None))
        start += padded[name]
    return found + _wrong_regions(file, regions)


def _wrong_in_gguf_header(header: bytes, tensors: list[GgufTensor], padded: dict[str, int]) -> Damage:
    """Checks magic, tensor infos and padding; the keys between them are not in any record."""
    prefix = GGUF_PREFIX.pack(b"GGUF", GGUF_VERSION, len(tensors), 0)[:16]
    if header[:16] != prefix:
        place = _first_difference(header[:16], prefix)
        return [("magic, version or number of tensors", f"byte {place} of the file differs")]
    try:
        infos = _gguf_infos(tensors, padded)
    except PackageError:  # the file's own hash shows that it is damaged, but not where
        return []
    wanted = b"".join(infos)
    if len(header) < len(wanted):
        return [("header", f"the file ends in it, at byte {len(header)}")]
    # The infos end where the padding begins, whose length is not in the record: where they fit best.
    ends = range(max(len(wanted), len(header) - ALIGNMENT + 1), len(header) + 1)
    end = min(ends, key=lambda end: (_num_differences(header[end - len(wanted) : end], wanted), -end))
    place = _first_difference(header[end - len(wanted) : end], wanted)
    if place is not None:
        for tensor, info in zip(tensors, infos, strict=True):
            if place < len(info):
                return [(f"info of {tensor.name!r}", f"byte {end - len(wanted) + place} of the file differs")]
            place -= len(info)
    if any(header[end:]):
        return [("padding after the header", f"bytes from {end} on of the file differ")]
    return []


def _gguf_infos(tensors: list[GgufTensor], padded: dict[str, int]) -> list[bytes]:
    infos, offset = [], 0
    for tensor in tensors:
        infos.append(_gguf_info(tensor, offset))
        offset += padded[tensor.name]
    return infos


def _gguf_info(tensor: GgufTensor, offset: int) -> bytes:
    name, shape = tensor.name.encode(), tensor.shape
    kind = int(load("gguf", "gguf").GGMLQuantizationType[tensor.type_name])
    return struct.pack(f"<Q{len(name)}sI{len(shape)}QIQ", len(name), name, len(shape), *reversed(shape), kind, offset)


def _wrong_regions(file: Readable, regions: Iterable[Region]) -> Damage:
    """Reads consecutive regions."""
    wrong = []
    for region in regions:
        digest, zeros = hashlib.sha256(), True
        for size in block_sizes(region.num_bytes):
            block = file.read(size)
            digest.update(block)
            zeros = zeros and (region.sha256 is not None or not any(block))
        if not zeros or (region.sha256 is not None and digest.hexdigest() != region.sha256):
            last = region.start + region.num_bytes - 1
            wrong.append((region.where, f"bytes {region.start} to {last} of the file differ"))
    return wrong


def _wrong_lines(path: Path, wanted: bytes) -> Damage:
    lines = zip(path.read_bytes().splitlines(), wanted.splitlines(), strict=False)
    for number, (found, line) in enumerate(lines, 1):
        if found != line:
            entry = re.match(rb'\s+"(.+)": "', line)
            where = f"entry of {entry[1].decode()!r}" if entry else f"line {number}"
            return [(where, f"{found[:160].decode(errors='replace')!r} instead of {line[:160].decode()!r}")]
    return []


def _no_json(path: Path) -> Damage:
    try:
        json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        return [(f"line {error.lineno}", f"not JSON: {error.msg}")]
    except ValueError as error:
        return [("content", f"not UTF-8: {error}")]
    except RecursionError:
        return [("content", "unreadable JSON: nested too deeply")]
    return []


def _first_difference(found: bytes, wanted: bytes) -> int | None:
    if found == wanted:
        return None
    return next(
        (place for place, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), len(found)
    )


def _num_differences(found: bytes, wanted: bytes) -> int:
    return sum(a != b for a, b in zip(found, wanted, strict=True))
