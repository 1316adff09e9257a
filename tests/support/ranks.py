"""Several ranks of one small job, started as a launcher does."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
from forked import Forked

from dsquant.jobs.ranks import Ranks, joined

# Three batches, the last of them short: each rank gets one, or one of two gets two.
SETTINGS = ["--samples", "5", "--seq-len", "500", "--group-size", "64", "--no-evaluate", "--json"]


def command(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    options = [*SETTINGS, "--calibration", str(text), *more]
    return ["awq", str(model), "--output", str(output), *options]


def start(size: int, *what: Any, before: Callable[[], object] | None = None) -> list[Forked]:
    """Starts ranks of `awq` as a launcher does."""
    return launched(size, command(*what), before)


def launched(size: int, line: list[str], before: Callable[[], object] | None = None) -> list[Forked]:
    """Starts ranks as a launcher does."""
    return [forked.start(*line, environment=one, before=before) for one in variables(size)]


def call(size: int, function: Callable[[Ranks], None]) -> list[Forked]:
    """Starts ranks that join and call a function."""

    def run() -> None:
        with joined() as ranks:
            function(ranks)

    return launched(size, ["--version"], run)


def variables(size: int) -> list[dict[str, str]]:
    """The variables of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(size)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


def finish(processes: list[Forked]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
