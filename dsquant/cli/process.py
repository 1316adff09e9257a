"""What every command does around its work: settings of the process, messages and exit codes of errors."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from dsquant.cli.ending import stopped_words
from dsquant.errors import DsquantError, InputError, Interrupted, PackageError, UsageError
from dsquant.escaping import printable
from dsquant.jobs.launcher import launched, several_ranks

if TYPE_CHECKING:
    from dsquant.reporting.progress import Report
    from dsquant.running import Metrics

# Past this size glibc maps memory of its own for a block and gives it back at once; without it the heap keeps what a
# few large tensors once needed.
MALLOC_MMAP_THRESHOLD = 2**20
# Commands that a launcher (torchrun, accelerate) may start as several processes; others would repeat their work.
SHARED_COMMANDS = {"awq": "awq", "gguf": "gguf", "evaluate": "eval", "verify": "verify"}


def dsquant_command(function: Callable[..., None]) -> Callable[..., None]:
    """Turns dsquant's errors into messages and exit codes."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            _prepare_process()
            if launched().size > 1 and function.__name__ not in SHARED_COMMANDS:
                *most, last = SHARED_COMMANDS.values()
                raise UsageError(
                    f"{function.__name__} runs in one process; only {', '.join(most)} and {last} share their work"
                )
            _check_texts(options)
            function(*arguments, **options)
        except DsquantError as error:
            rank = f" (rank {os.environ.get('RANK')})" if several_ranks() else ""
            click.echo(printable(f"dsquant{rank}: {error}"), err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:  # asked twice: the job did not wait for its next safe point
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            click.echo(stopped_words(signal.SIGINT), err=True)
            sys.exit(Interrupted.exit_code)
        except ImportError as error:
            click.echo(printable(f"dsquant: a package that is needed cannot be imported: {error}"), err=True)
            sys.exit(PackageError.exit_code)
        except OSError as error:  # a folder that is read-only, a file where a folder should be, a limit on file sizes
            click.echo(printable(f"dsquant: {error.filename or 'a file'}: {error.strerror or error}"), err=True)
            sys.exit(InputError.exit_code)

    return run


def _check_texts(options: dict[str, Any]) -> None:
    """Refuses null bytes, with which nothing has a name; only a caller inside Python can pass them."""
    for name, value in options.items():
        if any("\0" in str(part) for part in (value if isinstance(value, tuple) else (value,))):
            raise InputError(f"{name.strip('_')}: {value!r:.80} holds a null byte")


def _take_own_gpu() -> None:
    """Leaves this rank its own GPU alone, so that `cuda` means it in every thread."""
    place = launched().local_rank
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else []
    if visible is None or len(devices) > 1:  # a scheduler may have given each rank one already
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)] if devices else str(place)


def _prepare_process() -> None:
    """Changes settings of this process that a library must leave to its caller."""
    import ctypes

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if several_ranks():
        _take_own_gpu()
    mmap_threshold = -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, MALLOC_MMAP_THRESHOLD)


model_argument = click.argument("model", default="tiny-r1", metavar="[MODEL=tiny-r1]")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and no progress bar.")


def echo_json(found: Any) -> None:
    """Prints a result as JSON."""
    click.echo(json.dumps(found.as_json(), indent=2))


@contextmanager
def reporting(visible: bool, metrics: "Metrics", first: bool = True) -> "Iterator[Report]":
    """Shows a progress bar and publishes metrics while a job runs, of several ranks the first; yields the report."""
    from dsquant.reporting.prometheus import monitored
    from dsquant.reporting.terminal import progress_bar

    published = metrics.model_dump() if first else {}
    with quiet_libraries(), progress_bar(visible and first) as bar, monitored(bar, **published) as report:
        yield report


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps third-party warnings out of the progress bar."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("transformers", "accelerate", "datasets", "lm_eval"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
