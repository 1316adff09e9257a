"""Brings bytes to a disk: whole files or none, durable renames, and early writeback."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Ending of a file that is being written; it is renamed when it is whole.
PARTIAL = ".partial"
# So many bytes are written before the disk is told to begin with them.
BEGIN_AT = 64 * 2**20
# Errors of a disk or quota that is full, and of a file that may grow no further (ulimit -f).
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to errors of writing, which the system leaves out where a file is open already."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all, also after a power cut."""
    temporary = path.with_name(path.name + PARTIAL)
    with naming(path):
        temporary.write_bytes(content)
    publish(temporary, path)
    sync_folder(path.parent)


def copy_file(source: Path, copy: Path) -> None:
    """Copies a file's content; an error of a full disk names the copy, which the system names second."""
    try:
        shutil.copyfile(source, copy)
    except OSError as error:
        if error.errno in NO_ROOM:
            error.filename = str(copy)
        raise


def publish(partial: Path, path: Path) -> None:
    """Renames a complete file to its final name in the same folder, once its content is on disk."""
    with naming(path), partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def remove_tree(folder: Path) -> None:
    """Removes a folder with everything in it, if it exists, also while another process removes it; leaves a link
    alone."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes those folders that are empty, innermost first; another process may be removing them too."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Flushes renames inside a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Brings a file's content to disk, whoever has written it."""
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())


def write_at(descriptor: int, content: memoryview, start: int) -> None:
    """Writes bytes at a place of a file, whatever other threads write elsewhere in it."""
    while content:  # one call writes at most 2 GiB
        written = os.pwrite(descriptor, content, start)
        content, start = content[written:], start + written


def reserve(descriptor: int, count: int) -> None:
    """Reserves disk space for a file's first `count` bytes; their content stays. Raises OSError where there is no room.

    A full disk is an error here; behind a memory map it would be a signal that ends the process. Where a file system
    cannot do it nothing happens: posix_fallocate would write into the file, which other ranks may have open.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not count or not hasattr(libc, "fallocate"):
        return
    failed = libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(count))
    if failed and (number := ctypes.get_errno()) in NO_ROOM:
        raise OSError(number, os.strerror(number))


def begin_reading(descriptor: int, start: int, count: int) -> None:
    """Has the disk read bytes of a file that are wanted next; returns at once. Where that call is missing the system
    reads ahead as it does anyway."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_WILLNEED)


def begin_writing(descriptor: int, start: int, count: int) -> None:
    """Starts the writeback of bytes of a file; returns at once.

    Linux starts to write dirty pages when it is told that they are not needed, and keeps them until they are on disk.
    Where that call is missing the bytes wait for the next sync.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_DONTNEED)


def joined(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns extents, each its first place and the one after its last, in order, those that touch put together."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(extents):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


class EarlyWriteback:
    """Keeps the disk busy while a file is written, not only at its end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting: list[tuple[int, int]] = []

    def add(self, start: int, count: int) -> None:
        """Takes note that bytes of the file are written."""
        self._waiting.append((start, start + count))
        if sum(stop - begin for begin, stop in self._waiting) >= BEGIN_AT:
            for begin, stop in joined(self._waiting):
                begin_writing(self._descriptor, begin, stop - begin)
            self._waiting.clear()
