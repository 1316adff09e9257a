"""Whether an intact output holds what its source holds: every tensor, in the shapes and files that the record tells."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from dsquant.errors import InputError
from dsquant.foreign import check_relative, find_file, read_file
from dsquant.model.checkpoints import open_checkpoint
from dsquant.model.skeleton import Skeleton
from dsquant.planning import COMPUTED_SUFFIX, check_complete
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.fp8 import SCALE_SUFFIX
from dsquant.source.gguf_file import read_gguf
from dsquant.source.gguf_layout import placements
from dsquant.source.shards import DTYPES, INDEX_FILE, LARGEST_INTEGER, read_header
from dsquant.strict_json import read_json_object
from dsquant.verification.damage import recorded_shards
from dsquant.writers.base import index_content

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Problem = tuple[str, str, str]
"""File, where in it, and what is wrong."""


def source_parameters(record: Mapping[str, Any]) -> list[str]:
    """The parameters that the source has: its tensors without the scales of FP8, and what engines compute."""
    tensors = record["source"]["tensors_sha256"]
    return [
        name
        for name in tensors
        if not (name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in tensors)
        and not name.endswith(COMPUTED_SUFFIX)
    ]


def check_checkpoint(
    output: Path, folder: PurePosixPath, record: Mapping[str, Any]
) -> tuple[Checkpoint | None, list[Problem]]:
    """Checks index, headers, config and coverage of a safetensors output.

    Args:
        output: the output folder.
        folder: the checkpoint's folder in it.
        record: the output's record.

    Returns:
        The opened checkpoint, None where it cannot be opened; and what is wrong.
    """
    plan = recorded_shards(record["files"], folder)
    problems = _check_headers(output / folder, folder, record)
    index = find_file(output, str(folder / INDEX_FILE))
    if index is None or read_file(index) != index_content(plan):
        problems.append((str(folder / INDEX_FILE), "weight_map", "not the tensors and files that the record tells"))
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
    """Whether a tensor belongs to a multi-token-prediction layer that the job was told to drop."""
    parts = name.split(".")
    return record["recipe"]["mtp"] == "drop" and name.startswith("model.layers.") and int(parts[2]) >= layers


def _check_covered(where: str, wanted: Iterable[str], found: Iterable[str]) -> list[Problem]:
    there = set(found)
    return [(where, repr(name), "the source's tensor is not in the output") for name in wanted if name not in there]


def check_gguf(output: Path, first: PurePosixPath, record: Mapping[str, Any]) -> list[Problem]:
    """Checks headers and coverage of a GGUF output.

    Args:
        output: the output folder.
        first: its first file.
        record: the output's record.

    Returns:
        What is wrong.
    """
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
        counts = [field for key, field in reader.fields.items() if key.endswith(".block_count")]
        layers = max([layers, *(int(field.contents()) for field in counts)])
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


def read_record(path: Path) -> dict[str, Any]:
    """Reads an intact record.

    Args:
        path: dsquant.json.

    Returns:
        Its content.

    Raises:
        InputError: where it was written before records held the hashes of files, or by somebody else.
    """
    record = read_json_object(path, finite=False)
    if record.get("record_version") == 1:
        raise InputError(f"{path} is of an older dsquant, whose records hold no hashes of files; convert again")
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ", ".join(f"{part!r:.80}" for part in first["loc"])
        raise InputError(f"{path} is not a record that dsquant writes: {where}: {first['msg']}") from error
    return record


def _is_tensor(entry: list[Any]) -> list[Any]:
    """Type, SHA-256 and extents."""
    extents = entry[2:]
    if len(entry) < 2 or not all(isinstance(part, str) for part in entry[:2]):
        raise ValueError("a tensor has a type and a hash")
    if not all(type(extent) is int and 0 <= extent <= LARGEST_INTEGER for extent in extents):
        raise ValueError("a tensor's extents are integers")
    return entry


def _is_folder(name: str) -> str:
    return name if name == "." else check_relative(name)


class _File(BaseModel):
    bytes: Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
    sha256: str
    tensors: dict[str, Annotated[list[Any], AfterValidator(_is_tensor)]] = {}


class _Output(BaseModel):
    folder: Annotated[str, AfterValidator(_is_folder)]
    weight_errors: dict[str, float]


class _Source(BaseModel):
    architecture: str
    tensors_sha256: dict[str, str]


class _Recipe(BaseModel):
    model: str
    mtp: str


class _Record(BaseModel):
    """What is read of a record, which may come from anywhere; it seals itself, and so does a forged one."""

    files: dict[Annotated[str, AfterValidator(check_relative)], _File]
    outputs: dict[str, _Output] = Field(min_length=1)
    source: _Source
    recipe: _Recipe

    @model_validator(mode="after")
    def _types_are_known(self) -> Self:
        for name, file in self.files.items():
            kinds = {entry[0] for entry in file.tensors.values()}
            unknown = kinds - (_gguf_types() if name.endswith(".gguf") else DTYPES.keys())
            if unknown:
                raise ValueError(f"{name!r:.80} has tensors of type {min(unknown)!r:.40}")
        return self


def _gguf_types() -> set[str]:
    from gguf import GGMLQuantizationType

    return set(GGMLQuantizationType.__members__)
