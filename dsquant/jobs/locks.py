"""One run at a time on a folder; who comes second is told who works on it.

The lock itself is the kernel's and ends with its process, however that ends. A file next to it names its holder.
"""

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from dsquant.errors import InputError
from dsquant.files.disk import naming

LOCK_FILE = "lock"
HOLDER_FILE = "holder.json"
# A folder that came or went so often between two looks will never be there.
TRIES = 100


@contextmanager
def exclusive(folder: Path, subject: Path) -> Iterator[Callable[[], bool]]:
    """Holds the lock in `folder`, which is made where it is absent; `subject` is what is locked, for the message.

    Yields a function that tells whether the folder is still the one whose lock is held: the holder may move the folder
    away, and another run may then make and lock a new one. Raises InputError where another process holds it, with its
    number, its host and since when; or a link lies there.
    """
    path = folder / LOCK_FILE
    descriptor = _locked(path, subject)
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        temporary = folder / f"{HOLDER_FILE}.partial"
        with naming(folder / HOLDER_FILE):
            temporary.write_text(json.dumps(content))
        temporary.replace(folder / HOLDER_FILE)
        yield lambda: _lies_at(descriptor, path)
    finally:
        os.close(descriptor)


def _locked(path: Path, subject: Path) -> int:
    """Locks the file that lies at the path now, as an open descriptor: its holder may be moving its folder away.

    A package such as filelock keeps the descriptor to itself, and a path and a file's number alone cannot tell: the
    number of a file that is removed goes to the next.
    """
    for left in reversed(range(TRIES)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                raise InputError(f"{path} is a link; remove it")
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except (FileNotFoundError, FileExistsError):
            if not left or (os.path.lexists(path.parent) and not path.parent.is_dir()):
                raise
            continue  # it came or went between two looks
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _lies_at(descriptor, path):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError | PermissionError):
                raise
            raise InputError(
                f"{subject}: another dsquant run is working on this folder: {_holder(path.with_name(HOLDER_FILE))}; "
                "wait for it, or stop that process and run again"
            ) from error
        os.close(descriptor)
    raise InputError(f"{path} is replaced again and again by somebody else; stop that, or name another folder")


def _lies_at(descriptor: int, path: Path) -> bool:
    """Whether the file that is open lies at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "a process that has only just begun"
