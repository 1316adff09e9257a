"""Why a job stops before its end: a signal, a full disk, memory beyond its budget; each can be resumed."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dsquant.errors import Interrupted
from dsquant.files.disk import NO_ROOM
from dsquant.options import format_size


class StopRequest:
    """Remembers SIGTERM, SIGHUP and SIGINT until the next safe point."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: now
        self._signal = number
        again = "; Ctrl-C once more stops at once" if number == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(number).name}: stopping at the next safe point{again}\n".encode())

    def safe_point(self) -> None:
        """Raises Interrupted where a signal has asked to stop."""
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise Interrupted(f"stopped by {name} at a safe point; continue with --resume")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns SIGTERM, SIGHUP and SIGINT into a request that safe points obey; the old handlers return afterwards.

    A signal that is ignored, as SIGHUP under nohup, stays so. Outside the main thread, where Python sets no handlers,
    nothing ever sets the request.
    """
    import threading

    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(outer, StopRequest):  # inside a longer job: what was asked of that is asked of this
        yield outer
        return
    numbers = (signal.SIGTERM, signal.SIGINT, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, request._note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def not_resumable(what: str) -> Iterator[None]:
    """Has an Interrupted say that `what` cannot be continued."""
    try:
        yield
    except Interrupted as error:
        reason, _, _ = str(error).partition(";")
        raise Interrupted(f"{reason}; {what} cannot be resumed: run it again") from error


@contextmanager
def full_disk_is_resumable(
    then: str = "finished units are kept: make room and continue with --resume",
) -> Iterator[None]:
    """Raises Interrupted where disk or quota is full, or a file may grow no further; its message ends with `then`."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        what = "a limit on file sizes is reached (ulimit -f)" if error.errno == errno.EFBIG else "the disk is full"
        raise Interrupted(f"{what}: {error.filename or error}; {then}") from error


def memory_guard(budget_bytes: int, resident_bytes: Callable[[], int]) -> Callable[[], None]:
    """Returns a function that raises Interrupted where the resident memory is above the budget."""

    def check() -> None:
        found = resident_bytes()
        if found > budget_bytes:
            raise Interrupted(
                f"resident memory is {format_size(found)}, the budget {format_size(budget_bytes)}; "
                "continue with --resume and a larger --memory-budget"
            )

    return check
