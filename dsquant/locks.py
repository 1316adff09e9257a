"""One run at a time on a folder; who comes second is told who works on it.

The lock itself is the kernel's and ends with its process, however that ends. Who holds it stands in a file beside it.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dsquant.disk import naming
from dsquant.errors import InputError

if TYPE_CHECKING:
    from filelock import FileLock

LOCK_FILE = "lock"
HOLDER_FILE = "holder.json"


@contextmanager
def exclusive(folder: Path, subject: Path) -> Iterator[None]:
    """Holds a folder's lock.

    Args:
        folder: where the lock's files lie; it is made where it is absent.
        subject: what is locked, for the message.

    Yields:
        Nothing; the lock is held until the end.

    Raises:
        InputError: where another process holds it, with its number, its host and since when; or a link lies there.
    """
    lock = _acquired(folder, subject)
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        temporary = folder / f"{HOLDER_FILE}.partial"
        with naming(folder / HOLDER_FILE):
            temporary.write_text(json.dumps(content))
        temporary.replace(folder / HOLDER_FILE)
        yield
    finally:
        lock.release()


def _acquired(folder: Path, subject: Path) -> "FileLock":
    """Acquires the lock that lies in the folder now: its holder may be moving the folder away meanwhile."""
    from filelock import FileLock, Timeout

    path = folder / LOCK_FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            raise InputError(f"{path} is a link; remove it")
        lock = FileLock(path)
        try:
            path.touch()
            before = path.stat()
            lock.acquire(timeout=0)
            if os.path.samestat(path.stat(), before):
                return lock
        except FileNotFoundError:
            pass
        except Timeout as error:
            raise InputError(
                f"{subject}: another dsquant run is working on this folder: {_holder(folder / HOLDER_FILE)}; wait for "
                "it, or stop that process and run again"
            ) from error
        lock.release()


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "a process that has only just begun"
