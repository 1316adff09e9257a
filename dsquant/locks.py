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

from dsquant.disk import naming
from dsquant.errors import InputError

LOCK_FILE = "lock"
HOLDER_FILE = "holder.json"


@contextmanager
def exclusive(folder: Path, subject: Path) -> Iterator[None]:
    """Holds a folder's lock.

    Args:
        folder: where the lock's files lie.
        subject: what is locked, for the message.

    Yields:
        Nothing; the lock is held until the end.

    Raises:
        InputError: where another process holds it, with its number, its host and since when.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"{subject}: another dsquant run is working on this folder: {_holder(folder / HOLDER_FILE)}; wait for it, "
            "or stop that process and run again"
        ) from error
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


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "a process that has only just begun"
