"""Reads a patch's list of files strictly: a patch may come from anywhere."""

import io
import os
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from dsquant.errors import InputError
from dsquant.escaping import counted
from dsquant.files.foreign import LARGEST_TEXT_BYTES, check_relative
from dsquant.files.sealing import BYTES_AT_ONCE
from dsquant.files.strict_json import first_problem
from dsquant.jobs.folder_state import WORK_FOLDER
from dsquant.jobs.resources import default_memory_budget
from dsquant.options import format_size
from dsquant.verification.strict_record import Count, Digest

MANIFEST = "patch.json"
# Memory for parsing, checking and keeping a byte of JSON.
PARSED_BYTES = 16


def _stays_inside(name: str) -> str:
    if PurePosixPath(check_relative(name)).parts[0] == WORK_FOLDER:
        raise ValueError(f"{name!r} lies in the folder of an unfinished job")
    return name


FileName = Annotated[str, AfterValidator(_stays_inside)]


class PatchedFile(BaseModel):
    """Size and hash of a file of the new output, and how it is built.

    Attributes:
        bytes: its size.
        sha256: its hash.
        how: the same as in the old output; the old file with some tensors changed; or entirely from the patch.
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
        end = 0
        for start, num_bytes in self.tensors:
            if start < end:
                raise ValueError(f"the tensor at byte {start} begins before the previous one ends, at byte {end}")
            end = start + num_bytes
            if end > self.bytes:
                raise ValueError(f"{num_bytes} bytes from byte {start} on end after the file's {self.bytes} bytes")
        return self


class PatchManifest(BaseModel):
    """The content of patch.json: the old output's record by its hash, and path -> entry of the new output's files."""

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


class _InParts(io.BufferedReader):
    """A file that returns at most as many bytes at once as a patch's list of members has, whatever length it claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > LARGEST_TEXT_BYTES:
            raise zipfile.BadZipFile(f"its list of members has {size} bytes, at most {LARGEST_TEXT_BYTES} are read")
        return super().read(size)


@contextmanager
def open_patch(patch: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a patch and yields the archive. Raises InputError where there is no such file or it is damaged, also where
    the damage shows only while it is read."""
    if not patch.is_file():
        found = "is a folder" if patch.is_dir() else "does not exist"
        raise InputError(f"{patch} {found}; name a patch created by `dsquant delta`")
    try:
        with _InParts(io.FileIO(patch)) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{patch} is damaged or not a patch of dsquant ({error}); create it again") from error


def read_manifest(archive: zipfile.ZipFile, patch: Path) -> PatchManifest:
    """Reads a patch's manifest, and checks that the archive holds exactly its members. Raises InputError where it is
    not a manifest of `dsquant delta`, or a member is missing, unlisted, repeated, or of another size or kind."""
    try:
        manifest = PatchManifest.model_validate_json(read_member(archive, MANIFEST, patch))
    except ValidationError as error:
        problem = first_problem(error, MANIFEST)
        raise InputError(f"{patch}: {problem}; this dsquant cannot read the patch; create it again") from error
    wanted = {MANIFEST: archive.getinfo(MANIFEST).file_size, **_member_sizes(manifest)}
    found = Counter(info.filename for info in archive.infolist())
    for member in found.keys() | wanted.keys():
        if found[member] != (member in wanted):
            expected = "once" if member in wanted else "not at all"
            times = counted(found[member], "time")
            raise InputError(
                f"{patch}: {member!r:.300} is in it {times}, {MANIFEST} lists it {expected}; create the patch again"
            )
    for member, num_bytes in wanted.items():
        info = archive.getinfo(member)
        if info.file_size != num_bytes or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"{patch}: {member} has {info.file_size} bytes, {MANIFEST} lists {num_bytes}; create the patch again"
            )
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise InputError(f"{patch}: {member} is a link or a folder, not a file; create the patch again")
    return manifest


def _member_sizes(manifest: PatchManifest) -> dict[str, int]:
    """Returns every member that a manifest lists, with its bytes."""
    sizes = {}
    for name, entry in manifest.files.items():
        if entry.how == "new":
            sizes[f"new/{name}"] = entry.bytes
        sizes |= {f"xor/{name}/{number}": num_bytes for number, (_, num_bytes) in enumerate(entry.tensors)}
    return sizes


def member_blocks(archive: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    """Reads a member in blocks of bounded size, however much the deflated bytes expand to."""
    with archive.open(name) as member:
        while block := member.read(BYTES_AT_ONCE):
            yield block


def read_member(archive: zipfile.ZipFile, name: str, patch: Path) -> bytes:
    """Reads a member of JSON whole; raises InputError where it is too long for its values to fit in memory."""
    num_bytes, budget = archive.getinfo(name).file_size, default_memory_budget()
    if num_bytes > LARGEST_TEXT_BYTES or num_bytes * PARSED_BYTES > budget:
        raise InputError(
            f"{patch}: {name} has {format_size(num_bytes)}, at most {format_size(LARGEST_TEXT_BYTES)} are read, "
            f"and {format_size(budget // PARSED_BYTES)} with the memory that is available"
        )
    return b"".join(member_blocks(archive, name))
