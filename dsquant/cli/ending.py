"""How a command ends when it is asked to: a signal ends it with exit code 75, a reader who leaves does not.

A job stops at a safe point (`jobs.stop_on_signals`); this covers everything else: starting, reading, printing.
"""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import click

from dsquant.errors import Interrupted
from dsquant.jobs.launcher import several_ranks

RESUMABLE = ("awq", "gguf", "run", "delta")
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Group(click.Group):
    """The commands, which end quietly."""

    def main(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:
        """Runs a command, as click does; without arguments it is this process's own command line."""
        if args is not None:
            with quiet_ending():
                return super().main(args, *others, **options)
        _open_standard_streams()
        with _signals_ignored_behind(), quiet_ending(), _failed_ranks_end_at_once():
            return super().main(None, *others, **options)


@contextmanager
def quiet_ending() -> Iterator[None]:
    """Turns signals into exit code 75 without a traceback, and lets output go where its reader has left."""
    with _readers_may_leave(), _signals_end():
        yield


def stopped_words(number: int) -> str:
    """Returns a line that tells which signal ended the command, and what to do."""
    context = click.get_current_context(silent=True)
    words = "continue with --resume" if context and context.info_name in RESUMABLE else "run it again"
    return f"dsquant: stopped by {signal.Signals(number).name}; {words}"


def _open_standard_streams() -> None:
    """Opens what is closed of descriptors 0 to 2: a file of ours would get the number, and with it messages."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


@contextmanager
def _signals_ignored_behind() -> Iterator[None]:
    """Lets nothing change the exit code once it is decided: large packages take their time to leave."""
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)


@contextmanager
def _failed_ranks_end_at_once() -> Iterator[None]:
    """Ends one of several processes that has failed without taking its modules apart.

    Its connections to the others are still open then, and their threads can make SIGABRT of the exit code.
    """
    try:
        yield
    except SystemExit as end:
        if several_ranks() and end.code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise


@contextmanager
def _signals_end() -> Iterator[None]:
    """Has signals end the process, but for those that are ignored, as under nohup.

    At once, since libraries make errors of their own of an exception that a signal raises, or go on after it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
        with suppress(OSError):
            os.write(2, f"{cursor}{stopped_words(number)}\n".encode())
        os._exit(Interrupted.exit_code)

    before = {one: found for one in SIGNALS if (found := signal.getsignal(one)) not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Pipe(io.FileIO):
    """A descriptor that takes everything, though nobody may read it: a closed pipe, or a terminal that is gone."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content) or 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return memoryview(content).nbytes


@contextmanager
def _readers_may_leave() -> Iterator[None]:
    """Lets a command go on to its own exit code where nobody reads its output any more (`dsquant ... | head`)."""
    before = sys.stdout, sys.stderr
    own = _unbreakable(sys.stdout, 1), _unbreakable(sys.stderr, 2)
    sys.stdout, sys.stderr = own
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in filter(None, own):
            with suppress(OSError):  # it has been told of where it was written
                stream.flush()


def _unbreakable(stream: Any, number: int) -> Any:
    """A stream like this one that does not break; itself where it is not the process's own."""
    try:
        if stream.fileno() != number:
            return stream
    except (AttributeError, OSError, ValueError):  # closed, or a test's
        return stream
    buffer = io.BufferedWriter(_Pipe(number, "w", closefd=False))
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering)
