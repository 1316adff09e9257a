"""Reads files that others wrote: what may be read of them, and how errors are attributed.

In a model's folder, or in an output that is read as one, links are followed only inside the folder or inside the hub
cache that it lies in (`models--OWNER--NAME/snapshots/COMMIT`, whose files are links into `blobs`): whatever is read may
end up in a published output.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from dsquant.errors import DsquantError, InputError
from dsquant.files.disk import NO_ROOM, PARTIAL

# More than any config, index, tokenizer or recipe needs; larger files are read in parts or not at all.
LARGEST_TEXT_BYTES = 2**28
# The files of a checkpoint are shorter: R1's index has 9 MB. It is safetensors' own bound for headers.
LARGEST_MODEL_TEXT_BYTES = 100_000_000
LONGEST_NAME_BYTES, LONGEST_PATH_BYTES = 255, 4095
BYTES_AT_ONCE = 2**20
_PACKAGE = Path(__file__).parent.parent
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
    stat.S_IFLNK: "a link",
}
"""Type of a file's mode -> what it is in words, where it is not a regular file."""


def find_file(folder: Path, name: str) -> Path | None:
    """Returns the path of a file in a model's folder, which itself may be a link; None where nothing is there. Raises
    InputError where it is not a regular file, or a link leads out of the model."""
    path = folder / name
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # links in a circle, no right to look; a null byte in the name
        raise InputError(f"{str(path)!r} cannot be read ({error})") from error
    _check_regular(path, mode)
    real = Path(os.path.realpath(path))
    ours = folder.is_relative_to(_PACKAGE)  # installers may link a package's own files into a cache
    if not ours and not any(real.is_relative_to(root) for root in _roots(folder)):
        raise InputError(
            f"{path} is a link that leads out of the model's folder, to {real}; copy the file to its place if it "
            "belongs to the model"
        )
    return path


def _roots(folder: Path) -> Iterator[Path]:
    """Yields the folder, and the one of the hub cache that holds all commits of its model."""
    real = Path(os.path.realpath(folder))
    yield real
    for snapshot in (real, *real.parents):
        model = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and model.name.startswith("models--"):
            yield model


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is {KINDS.get(stat.S_IFMT(mode), 'something else')}; expected a regular file")


def open_file(path: Path) -> BinaryIO:
    """Opens a regular file for reading without blocking, as a named pipe would. Raises InputError where it is not a
    regular file, or cannot be opened."""
    try:
        _check_regular(path, path.stat().st_mode)  # before it is opened: that alone may rewind a tape
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        try:
            _check_regular(path, os.fstat(descriptor).st_mode)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except (OSError, ValueError) as error:  # ValueError for a null byte in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{str(path)!r} cannot be read ({reason})") from error


def read_file(path: Path, most_bytes: int = LARGEST_TEXT_BYTES) -> bytes:
    """Reads a regular file whole; raises InputError where it is not one, is longer than `most_bytes`, or unreadable."""
    raw = bytearray()
    with open_file(path) as file:
        check_size(path, most_bytes)
        try:
            while block := file.read(BYTES_AT_ONCE):  # a file of /proc says that it has no bytes
                raw += block
                if len(raw) > most_bytes:
                    raise InputError(f"{path} has more than {most_bytes} bytes; no file of its kind has")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return bytes(raw)


def check_size(path: Path, most_bytes: int = LARGEST_TEXT_BYTES) -> None:
    """Refuses an existing file of more than `most_bytes`, with InputError."""
    size = path.stat().st_size
    if size > most_bytes:
        raise InputError(f"{path} has {size} bytes; a file of its kind has at most {most_bytes}")


@contextmanager
def blaming(subject: Path | str, then: str = "restore the file") -> Iterator[None]:
    """Turns any error of the parser of a foreign file into an InputError that names the file and what to do.

    Only for other packages' parsers: around our own code it would hide our mistakes.
    """
    try:
        yield
    except (DsquantError, ImportError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise  # a package that is missing is not the file's fault either
    except BaseException as error:  # a panic of a package in Rust is not an Exception
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise  # a package keeps something on the disk: not the file's fault
        reason = " ".join(str(error).split())
        raise InputError(f"{subject}: {type(error).__name__}: {reason:.300}; {then}") from error


def check_relative(name: object) -> str:
    """Checks that a recorded name can only mean a file inside the folder of its record, and returns it. Raises
    ValueError with the reason where it is not a plain relative path."""
    if not isinstance(name, str):
        raise ValueError(f"{name!r:.80} is not the name of a file")
    parts = PurePosixPath(name).parts
    if not parts or "/".join(parts) != name or name.startswith("/") or ".." in parts or "\0" in name:
        raise ValueError(f"{name!r:.80} is not a plain path inside the output folder")
    try:
        longest = max(len(os.fsencode(part)) for part in parts)
    except UnicodeEncodeError as error:
        raise ValueError(f"{name!r:.80} cannot be the name of a file") from error
    if longest > LONGEST_NAME_BYTES:
        raise ValueError(f"{name[:40]!r}... is longer than the {LONGEST_NAME_BYTES} bytes of a file name")
    return name


def own_path(output: Path, name: object) -> Path:
    """Returns the path of a file that an output's record names, to be written or removed; a link there is not followed.
    Raises InputError where the name, or a link on the way, leads out of the folder."""
    try:
        path = output / check_relative(name)
        if len(os.fsencode(path.absolute())) + len(PARTIAL) > LONGEST_PATH_BYTES:
            raise ValueError(f"{str(name)[:40]!r}... makes a longer path than file systems allow")
    except ValueError as error:
        raise InputError(f"{output}: its record is damaged or forged: {error}; remove the folder yourself") from error
    parent = Path(os.path.realpath(path.parent))
    if not parent.is_relative_to(os.path.realpath(output)):
        raise InputError(
            f"{output}: its record names {name!r:.80}, which lies elsewhere, in {parent}; remove the folder yourself"
        )
    return path


def check_plain_files(output: Path) -> None:
    """Refuses to continue in an output folder where writing would go somewhere else. Raises InputError where it holds a
    link, or something that is neither a file nor a folder; it may itself be a link."""
    for folder, folders, files in os.walk(output):
        for name in (*folders, *files):
            path = Path(folder, name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # another run is working here, as the lock will show
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                kind = "a link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
                raise InputError(f"{path} is {kind}, which dsquant does not create; remove it, or name another folder")
