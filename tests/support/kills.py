"""Runs a job in a forked process that ends, as by a power cut, before a chosen call that changes a file."""

import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "os.symlink")
KILLED, REFUSED = 99, 3


def changes_in(folder: Path, event: str, arguments: Sequence[Any]) -> bool:
    """Whether an audit event is about to change a file of a folder."""
    if event == "open":
        path, _, flags = arguments[:3]
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and inside(folder, path)
    return event in CHANGES and any(inside(folder, argument) for argument in arguments[:2])


def inside(folder: Path, path: Any) -> bool:
    # Calls relative to an open folder (shutil.rmtree) give no path that could be told apart: they count.
    return isinstance(path, str | bytes | os.PathLike) and (
        not Path(os.fsdecode(path)).is_absolute() or os.fsdecode(path).startswith(str(folder))
    )


def run(job: Callable[[], Any], folder: Path, kill_before: int | None) -> tuple[int, int]:
    """Runs a job in a process of its own.

    Args:
        job: what to run; dsquant's errors end it with their exit codes.
        folder: absolute; calls that change files in it are counted.
        kill_before: the number of the call before which the process ends; None lets it run.

    Returns:
        The exit code, `KILLED` where it was killed; and how many calls there were.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which is pytest-timeout's here
        signal.alarm(1800)
        _child(job, folder, kill_before, write)
    os.close(write)
    with os.fdopen(read) as pipe:
        counted = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(counted or 0)


def _child(job: Callable[[], Any], folder: Path, kill_before: int | None, pipe: int) -> None:
    from dsquant.errors import DsquantError

    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if changes_in(folder, event, arguments):
            if count == kill_before:
                os._exit(KILLED)
            count += 1

    sys.addaudithook(hook)
    code = 0
    try:
        job()
    except DsquantError as error:
        code = error.exit_code
        if os.environ.get("KILLS_VERBOSE"):
            traceback.print_exc()
    except BaseException:
        traceback.print_exc()
        code = 1
    os.write(pipe, str(count).encode())
    os._exit(code)


def tear(folder: Path, moments: random.Random) -> None:
    """Cuts what a power cut may have cut: the line that a journal was writing, and a shard without its name yet."""
    for journal in folder.rglob("journal.jsonl"):
        raw = journal.read_bytes()
        start = raw.rstrip(b"\n").rfind(b"\n") + 1
        if raw and moments.random() < 0.5:
            os.truncate(journal, moments.randrange(start, len(raw)))
    for partial in folder.rglob("*.safetensors.partial"):
        if partial.stat().st_nlink == 1:
            os.truncate(partial, moments.randrange(partial.stat().st_size + 1))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, of whatever kind, and every empty folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink()).encode()
        elif path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[name + "/"] = b""
    return found
