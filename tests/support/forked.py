"""`dsquant` in a process of its own, forked from the tests': a new interpreter imports for ten seconds of CPU first."""

import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import BinaryIO

from dsquant.cli import main
from dsquant.pipeline import job  # noqa: F401  (what every job imports)


class Forked:
    """What the tests use of `subprocess.Popen`."""

    def __init__(self, pid: int, outputs: tuple[BinaryIO, BinaryIO]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._outputs = outputs
        self._told = ("", "")

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                self._told = self._written()
                for file in self._outputs:
                    file.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 600) -> int:
        """Waits; kills it where it takes longer."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"process {self.pid} runs for more than {timeout} s: {self._written()[1]}")
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Waits; what it has written to its standard output and standard error."""
        self.wait(timeout)
        return self._told

    def _written(self) -> tuple[str, str]:
        descriptors = (file.fileno() for file in self._outputs)
        out, error = (os.pread(one, os.fstat(one).st_size, 0).decode() for one in descriptors)
        return out, error


def start(
    *arguments: object, environment: Mapping[str, str] | None = None, before: Callable[[], object] | None = None
) -> Forked:
    """Starts `dsquant ARGUMENTS`.

    Args:
        arguments: of the command line.
        environment: changes of the variables.
        before: called in the new process first.
    """
    outputs = (tempfile.TemporaryFile(), tempfile.TemporaryFile())  # noqa: SIM115 (closed when the process has ended)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of threads, of which xdist has some
        pid = os.fork()
    if pid == 0:
        _child([str(argument) for argument in arguments], outputs, environment or {}, before)
    return Forked(pid, outputs)


def anew(*packages: str) -> None:
    """Forgets packages, for `before`: they are imported again, and read the variables of the new process."""
    for module in [module for module in sys.modules if module.split(".")[0] in packages]:
        del sys.modules[module]


def finish(*arguments: object) -> Forked:
    """Runs `dsquant ARGUMENTS` to its end, which must be a good one."""
    process = start(*arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return process


def _child(
    arguments: list[str],
    outputs: tuple[BinaryIO, BinaryIO],
    environment: Mapping[str, str],
    before: Callable[[], object] | None,
) -> None:
    code = 1
    try:
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # SIGALRM is pytest-timeout's here
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor, file in zip((1, 2), outputs, strict=True):
            os.dup2(file.fileno(), descriptor)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.environ.update({"TOKENIZERS_PARALLELISM": "false", **environment})
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        if before is not None:
            before()
        sys.argv = ["dsquant", *arguments]
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
