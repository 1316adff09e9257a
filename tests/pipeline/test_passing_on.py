"""Hidden states that stay in memory from layer to layer change no byte, and a killed job goes on without them."""

import os
from functools import partial
from pathlib import Path

import forked
import pytest
from as_on_gpus import KEPT, patch
from small_jobs import arguments, contents

from dsquant.jobs.journal import Journal
from dsquant.model import streaming


def _run(kept: str, *arguments: object, dies_after: int | None = None) -> int:
    """Runs a job as on a GPU; it ends once so many units are journaled. Returns the exit code."""
    process = forked.start(*arguments, before=partial(_prepare, kept, dies_after))
    _, errors = process.communicate()
    assert process.returncode in (0, 9), errors
    return process.returncode


def _prepare(kept: str, dies_after: int | None) -> None:
    patch(KEPT[kept])
    streaming.BATCH_TOKENS = 64  # three batches
    append, units = Journal.append, list[str]()

    def appended(self: Journal, unit: str, **notes: object) -> None:
        append(self, unit, **notes)
        units.append(unit)
        if len(units) == dies_after:
            os._exit(9)

    Journal.append = appended  # type: ignore[method-assign]


@pytest.mark.parametrize("steps", ["scales", pytest.param("scales,follow", marks=pytest.mark.slow)])
def test_what_stays_in_memory_and_what_lies_in_files_give_the_same_bytes_also_after_a_kill(
    nano_r1: Path, text_file: Path, tmp_path: Path, steps: str
) -> None:
    assert _run("none", *arguments(nano_r1, text_file, tmp_path / "none", "--steps", steps)) == 0
    job = arguments(nano_r1, text_file, tmp_path / "every", "--steps", steps)
    assert _run("every", *job, dies_after=2) == 9
    assert _run("every", *job, "--resume") == 0
    assert contents(tmp_path / "every") == contents(tmp_path / "none")
