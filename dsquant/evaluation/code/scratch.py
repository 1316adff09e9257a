"""Removes a folder that a hostile program has filled: never an error, never through a link.

A tree may be deeper than paths are long or descriptors many, its permissions may be gone and its files locked. So
every folder found is first moved to the top and emptied there: two descriptors and short names suffice for any depth.
"""

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from secrets import token_hex

FOLDER_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
# Linux's calls for a file's flags (`chattr`), and the two that keep a file from being removed.
GET_FLAGS, SET_FLAGS, IMMUTABLE, APPEND_ONLY = 0x80086601, 0x40086602, 0x10, 0x20


def remove_tree(folder: str) -> bool:
    """Removes a folder with everything in it, as far as this user can; returns whether it is gone.

    Files that could not be removed stay in place or lie at the folder's top.
    """
    parent, name = os.path.split(os.path.abspath(folder))  # noqa: PTH100 - the path itself, not what a link leads to
    with suppress(OSError):
        outer = os.open(parent, FOLDER_FLAGS)
        try:
            _remove(name, outer)
        finally:
            os.close(outer)
    return not os.path.lexists(folder)


def _remove(name: str, outer: int) -> None:
    with suppress(OSError), _opened(name, outer) as top:
        waiting = _emptied(top, top)
        while waiting:
            inner_name = waiting.pop()
            with suppress(OSError):
                with _opened(inner_name, top) as inner:
                    waiting += _emptied(inner, top)
                os.rmdir(inner_name, dir_fd=top)
    os.rmdir(name, dir_fd=outer)


@contextmanager
def _opened(name: str, outer: int) -> Iterator[int]:
    """Opens a folder inside another one, unlocked."""
    _unlock(name, outer)
    descriptor = os.open(name, FOLDER_FLAGS, dir_fd=outer)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _emptied(folder: int, top: int) -> list[str]:
    """Removes a folder's files and moves its folders to the top; returns their names there."""
    names = []
    for name in os.listdir(folder):
        with suppress(OSError):
            if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                _unlink(name, folder)
            elif folder == top:
                names.append(name)
            else:
                _unlock(name, folder)  # a folder that moves has its `..` written
                moved = token_hex(16)
                os.rename(name, moved, src_dir_fd=folder, dst_dir_fd=top)
                names.append(moved)
    return names


def _unlink(name: str, folder: int) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except PermissionError:
        _unlock(name, folder)
        os.unlink(name, dir_fd=folder)


def _unlock(name: str, outer: int) -> None:
    """Clears flags that keep a file or folder from being removed, and restores the owner's permissions for a folder."""
    with suppress(OSError):
        mode = os.stat(name, dir_fd=outer, follow_symlinks=False).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            _clear_flags(name, outer)
        if stat.S_ISDIR(mode) and mode & stat.S_IRWXU != stat.S_IRWXU:
            with suppress(NotImplementedError):
                os.chmod(name, stat.S_IRWXU, dir_fd=outer, follow_symlinks=False)


def _clear_flags(name: str, outer: int) -> None:
    import fcntl

    with suppress(OSError):
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=outer)
        try:
            (flags,) = struct.unpack("i", fcntl.ioctl(descriptor, GET_FLAGS, bytes(4)))
            if flags & (IMMUTABLE | APPEND_ONLY):
                fcntl.ioctl(descriptor, SET_FLAGS, struct.pack("i", flags & ~(IMMUTABLE | APPEND_ONLY)))
        finally:
            os.close(descriptor)
