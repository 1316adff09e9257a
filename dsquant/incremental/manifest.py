"""What a patch tells of the output that it makes, read strictly: a patch may come from anywhere."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dsquant.errors import InputError
from dsquant.foreign import check_relative
from dsquant.jobs import WORK_FOLDER

MANIFEST = "patch.json"


def _stays_inside(name: str) -> str:
    if PurePosixPath(check_relative(name)).parts[0] == WORK_FOLDER:
        raise ValueError(f"{name!r} lies in the folder of an unfinished job")
    return name


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
FileName = Annotated[str, AfterValidator(_stays_inside)]


class PatchedFile(BaseModel):
    """How a file of the new output comes about.

    Attributes:
        bytes: its size.
        sha256: its hash.
        how: as in the old output; the old file with some tensors changed; or whole in the patch.
        tensors: the changed places, start and bytes.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    bytes: Count
    sha256: Digest
    how: Literal["same", "tensors", "new"]
    tensors: tuple[tuple[Count, Count], ...] = ()

    @model_validator(mode="after")
    def _places_are_in_the_file(self) -> Self:
        if self.tensors and self.how != "tensors":
            raise ValueError(f"a file that is {self.how} has no changed tensors")
        for start, num_bytes in self.tensors:
            if start + num_bytes > self.bytes:
                raise ValueError(f"{num_bytes} bytes from byte {start} on end behind the file's {self.bytes} bytes")
        return self


class PatchManifest(BaseModel):
    """The content of patch.json.

    Attributes:
        patch_version: of this layout.
        old_record_sha256: of the old output's dsquant.json.
        files: path in the new output -> how it comes about.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    patch_version: Literal[1]
    old_record_sha256: Digest
    files: dict[FileName, PatchedFile]

    @model_validator(mode="after")
    def _no_file_is_a_folder(self) -> Self:
        for name in self.files:
            folder = next((str(folder) for folder in PurePosixPath(name).parents if str(folder) in self.files), None)
            if folder is not None:
                raise ValueError(f"{folder!r} cannot be a file and hold {name!r}")
        return self


@contextmanager
def open_patch(patch: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a patch.

    Args:
        patch: the file.

    Yields:
        The archive; what shows later that it is damaged becomes an InputError too.

    Raises:
        InputError: where there is no such file, or it is damaged.
    """
    if not patch.is_file():
        found = "is a folder" if patch.is_dir() else "does not exist"
        raise InputError(f"{patch} {found}; name a patch that `dsquant delta` has made")
    try:
        with zipfile.ZipFile(patch) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{patch} is damaged or no patch of dsquant ({error}); make it again") from error


def read_manifest(archive: zipfile.ZipFile, patch: Path) -> PatchManifest:
    """Reads what a patch tells, and checks that the archive holds what it should.

    Args:
        archive: the opened patch.
        patch: its path, for messages.

    Returns:
        The manifest.

    Raises:
        InputError: where it is not what `dsquant delta` writes, or a part of the patch is missing or of another size.
    """
    try:
        manifest = PatchManifest.model_validate_json(archive.read(MANIFEST))
    except ValidationError as error:
        first = error.errors()[0]
        where = ", ".join([MANIFEST, *(repr(part)[:80] for part in first["loc"])])
        raise InputError(
            f"{patch}: {where}: {first['msg']}; this is no patch that this dsquant reads, make it again"
        ) from error
    for name, entry in manifest.files.items():
        members = {f"xor/{name}/{number}": num_bytes for number, (_, num_bytes) in enumerate(entry.tensors)}
        if entry.how == "new":
            members = {f"new/{name}": entry.bytes}
        for member, num_bytes in members.items():
            info = archive.getinfo(member)
            if info.file_size != num_bytes or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(
                    f"{patch}: {member} has {info.file_size} bytes, {MANIFEST} tells of {num_bytes}; "
                    "make the patch again"
                )
    return manifest
