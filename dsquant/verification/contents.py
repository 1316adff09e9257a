"""Checks that an intact output holds what its source holds: every tensor, in the recorded shapes and files."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dsquant.errors import InputError
from dsquant.files.foreign import find_file, read_file
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.formats.gguf.file import read_gguf
from dsquant.formats.gguf.layout import placements
from dsquant.formats.output_shards import index_content
from dsquant.model.complete import COMPUTED_SUFFIX, check_complete
from dsquant.model.skeleton import Skeleton
from dsquant.source.checkpoint import Checkpoint, parameters_of
from dsquant.source.shards import INDEX_FILE, read_header
from dsquant.verification.damage import recorded_shards

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Problem = tuple[str, str, str]
"""File, place in it, and problem."""


def source_parameters(record: Mapping[str, Any]) -> list[str]:
    """Returns the source's parameters: what its tensors make, without those that engines compute."""
    parameters = parameters_of(record["source"]["tensors_sha256"])
    return [name for name in parameters if not name.endswith(COMPUTED_SUFFIX)]


def check_checkpoint(
    output: Path, folder: PurePosixPath, record: Mapping[str, Any]
) -> tuple[Checkpoint | None, list[Problem]]:
    """Checks index, headers, config and coverage of a safetensors output, in `folder` of the output folder.

    Returns the opened checkpoint, None where it cannot be opened, and the problems.
    """
    plan = recorded_shards(record["files"], folder)
    problems = _check_headers(output / folder, folder, record)
    index = find_file(output, str(folder / INDEX_FILE))
    if index is None or read_file(index) != index_content(plan):
        problems.append((str(folder / INDEX_FILE), "weight_map", "not the tensors and files of the record"))
    try:
        checkpoint = open_checkpoint(output / folder)
        check_complete(checkpoint, Skeleton(checkpoint))
    except InputError as error:
        return None, [*problems, (str(folder), "network", str(error))]
    layers = int(checkpoint.config["num_hidden_layers"])
    wanted = [name for name in source_parameters(record) if not _dropped(name, record, layers)]
    where = str(folder / INDEX_FILE)
    problems += _check_covered(where, wanted, checkpoint.weights)
    problems += [
        (where, repr(name), "the source has no such tensor") for name in checkpoint.weights if name not in set(wanted)
    ]
    return checkpoint, problems


def _check_headers(directory: Path, folder: PurePosixPath, record: Mapping[str, Any]) -> list[Problem]:
    problems = []
    for shard in recorded_shards(record["files"], folder).shards:
        try:
            header = read_header(directory / shard.file_name)
        except InputError as error:
            problems.append((str(folder / shard.file_name), "header", str(error)))
            continue
        planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
        found = {name: (info.dtype, info.shape) for name, info in header.items()}
        problems += [
            (
                str(folder / shard.file_name),
                repr(name),
                f"dtype and shape are {found.get(name)}, the record says {planned.get(name)}",
            )
            for name in planned.keys() | found.keys()
            if planned.get(name) != found.get(name)
        ]
    return problems


def _dropped(name: str, record: Mapping[str, Any], layers: int) -> bool:
    """Returns whether a tensor belongs to a multi-token-prediction layer that the job dropped."""
    parts = name.split(".")
    return record["recipe"]["mtp"] == "drop" and name.startswith("model.layers.") and int(parts[2]) >= layers


def _check_covered(where: str, wanted: Iterable[str], found: Iterable[str]) -> list[Problem]:
    there = set(found)
    return [(where, repr(name), "the source's tensor is not in the output") for name in wanted if name not in there]


def check_gguf(output: Path, first: PurePosixPath, record: Mapping[str, Any]) -> list[Problem]:
    """Checks headers and coverage of a GGUF output, whose first file is given relative to the output folder."""
    problems: list[Problem] = []
    found: dict[str, tuple[int, ...]] = {}
    layers = 0
    for name, entry in record["files"].items():
        path = PurePosixPath(name)
        if path.parent != first.parent or path.suffix != ".gguf" or path.name.startswith("imatrix"):
            continue
        try:
            reader = read_gguf(output / name)
        except InputError as error:
            problems.append((name, "header", str(error)))
            continue
        for tensor in reader.tensors:
            shape = tuple(int(extent) for extent in reversed(tensor.shape))
            found[tensor.name] = shape
            recorded = entry["tensors"].get(tensor.name)
            if recorded is None or [tensor.tensor_type.name, *shape] != [recorded[0], *recorded[2:]]:
                problems.append((name, repr(tensor.name), f"{tensor.tensor_type.name} {shape}, recorded: {recorded}"))
        layers = max([layers, *(int(value) for key, value in reader.keys.items() if key.endswith(".block_count"))])
    hashes = record["source"]["tensors_sha256"]
    tied = hashes.get(HEAD) == hashes.get(EMBEDDING)
    wanted = [name for name in source_parameters(record) if not _dropped(name, record, layers)]
    covered = [name for name in wanted if _has_place(name, record, found) or (name == HEAD and tied)]
    return problems + _check_covered(str(first), wanted, covered)


def _has_place(name: str, record: Mapping[str, Any], found: Mapping[str, tuple[int, ...]]) -> bool:
    places = placements(name, record["source"]["architecture"])
    return bool(places) and all(
        place.tensor in found and (place.expert is None or place.expert < found[place.tensor][0]) for place in places
    )
