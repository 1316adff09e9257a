"""What every command does around its work: settings of the process, messages and exit codes of errors."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click

from dsquant.errors import DsquantError

# Past this size glibc maps memory of its own for a block and gives it back at once; without it the heap keeps what a
# few large tensors once needed.
MALLOC_MMAP_THRESHOLD = 2**20


def dsquant_command(function: Callable[..., None]) -> Callable[..., None]:
    """Turns dsquant's errors into messages and exit codes."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        _prepare_process()
        try:
            function(*arguments, **options)
        except DsquantError as error:
            click.echo(f"dsquant: {error}", err=True)
            sys.exit(error.exit_code)

    return run


def _prepare_process() -> None:
    """Settings of this process that a library must not make for its caller."""
    import ctypes

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared machine, waiting threads must not spin
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # a budget has no room for gaps
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    mmap_threshold = -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, MALLOC_MMAP_THRESHOLD)


def metrics_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that runs a job: where its metrics go."""
    port = click.option("--metrics-port", type=click.IntRange(1, 65535), help="Serve Prometheus metrics on this port.")
    file = click.option(
        "--metrics-file",
        type=click.Path(path_type=Path),
        help="Write metrics for node_exporter's textfile collector; the name ends in .prom.",
    )
    return port(file(function))


@contextmanager
def reporting(visible: bool, metrics_file: Path | None, metrics_port: int | None) -> Iterator[Any]:
    """Shows a progress bar and publishes metrics while a job runs; yields what it reports to."""
    from dsquant.display import progress_bar
    from dsquant.monitoring import monitored

    with quiet_libraries(), progress_bar(visible) as bar, monitored(bar, metrics_file, metrics_port) as report:
        yield report


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps third-party warnings out of the progress bar."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("transformers", "accelerate", "datasets"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
