"""Reads an output's record strictly: it may come from anywhere, and its seal only shows who changed it last."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dsquant.errors import InputError
from dsquant.files.foreign import check_relative
from dsquant.files.strict_json import first_problem, read_json_object
from dsquant.formats.gguf.types import TYPES
from dsquant.source.shards import DTYPES, LARGEST_INTEGER

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


def _place(folder: str) -> str:
    return folder if folder == "." else check_relative(folder)


def _tensor(entry: list[Any]) -> list[Any]:
    """Checks dtype, SHA-256 and extents of a tensor."""
    dtype, digest, *shape = entry if len(entry) > 1 else ("", "")
    sizes = all(type(extent) is int and 0 <= extent <= LARGEST_INTEGER for extent in shape)
    if (dtype not in DTYPES and not (dtype in TYPES and shape)) or not isinstance(digest, str) or not sizes:
        raise ValueError("must be a known dtype, a hash and extents")
    return entry


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _File(_Strict):
    bytes: Count
    sha256: Digest
    tensors: dict[str, Annotated[list[Any], AfterValidator(_tensor)]] | None = None
    metadata: str = "pt"


class _Output(_Strict):
    folder: Annotated[str, AfterValidator(_place)]
    weight_errors: dict[str, float]


class _RecordedRecipe(_Strict):
    model: str
    mtp: str


class _RecordedSource(_Strict):
    architecture: str
    tensors_sha256: dict[str, Digest]


class _Record(_Strict):
    """The fields of a record that are read; others are ignored."""

    recipe: _RecordedRecipe
    source: _RecordedSource
    outputs: dict[str, _Output] = Field(min_length=1)
    files: dict[Annotated[str, AfterValidator(check_relative)], _File]


class ReleaseRecord(_Strict):
    """The fields that are read of the record of `dsquant run`: the files that no output's record lists."""

    files: dict[Annotated[str, AfterValidator(check_relative)], _File]


def read_record(path: Path) -> dict[str, Any]:
    """Reads an intact dsquant.json; raises InputError where it is not dsquant's, or from before records held files'
    hashes."""
    record = read_json_object(path, finite=False)
    if "files" not in record or record.get("record_version") == 1:
        raise InputError(
            f"{path} is from an older dsquant, whose records hold no hashes of files; convert the model again"
        )
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        raise InputError(f"{path} is not a record of dsquant: {first_problem(error)}; convert again") from error
    for name, entry in record["files"].items():
        if "tensors" not in entry and PurePosixPath(name).suffix in (".safetensors", ".gguf"):
            raise InputError(f"{path} is not a record of dsquant: 'files', {name!r:.80}: holds no tensors")
    return record
