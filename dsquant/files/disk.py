"""How bytes get to a disk: whole files or none, renames that last, and writing that begins at once."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Ending of a file that is being written; it is renamed when it is whole.
PARTIAL = ".partial"
# Errors of a disk or quota that is full, and of a file that may grow no further (ulimit -f).
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an error of writing the file's name, which the system leaves out where a file is open already.

    Args:
        path: the file.

    Yields:
        Nothing.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it is there as a whole or not at all, also after a power cut.

    Args:
        path: the file.
        content: its content.
    """
    temporary = path.with_name(path.name + PARTIAL)
    with naming(path):
        temporary.write_bytes(content)
    publish(temporary, path)
    sync_folder(path.parent)


def copy_file(source: Path, copy: Path) -> None:
    """Copies a file's content; an error of a full disk names the copy, which the system names second.

    Args:
        source: the file.
        copy: the new one.
    """
    try:
        shutil.copyfile(source, copy)
    except OSError as error:
        if error.errno in NO_ROOM:
            error.filename = str(copy)
        raise


def publish(partial: Path, path: Path) -> None:
    """Gives a file that is whole its name, once its content is on disk.

    Args:
        partial: the file.
        path: its name, in the same folder.
    """
    with naming(path), partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def remove_tree(folder: Path) -> None:
    """Removes a folder with all in it, where it is there; another process may be removing it too.

    Args:
        folder: the folder; a link is left alone.
    """
    shutil.rmtree(folder, ignore_errors=True)


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes those folders in which nothing is left; another process may be removing them too.

    Args:
        folders: in this order; the innermost first.
    """
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Brings renames inside a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, content: memoryview, start: int) -> None:
    """Writes bytes at a place of a file, whatever other threads write elsewhere in it.

    Args:
        descriptor: of the file.
        content: the bytes.
        start: the place of the first.
    """
    while content:  # one call writes at most 2 GiB
        written = os.pwrite(descriptor, content, start)
        content, start = content[written:], start + written


def reserve(descriptor: int, count: int) -> None:
    """Has the disk set room aside for a file's first bytes; what they hold stays.

    A full disk is an error here then; behind a memory map it would be a signal that ends the process. Where a file
    system cannot do it nothing happens: posix_fallocate would write into the file, which other ranks may have open.

    Args:
        descriptor: of the file.
        count: how many bytes.

    Raises:
        OSError: where there is no room.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not count or not hasattr(libc, "fallocate"):
        return
    failed = libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(count))
    if failed and (number := ctypes.get_errno()) in NO_ROOM:
        raise OSError(number, os.strerror(number))


def begin_writing(descriptor: int, start: int, count: int) -> None:
    """Lets the disk begin with bytes that have been written to a file; returns at once.

    Linux starts to write dirty pages when it is told that they are not needed, and keeps them until they are on disk.
    Where that call is missing the bytes wait for the next sync.

    Args:
        descriptor: of the file.
        start: the first byte.
        count: how many.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_DONTNEED)
