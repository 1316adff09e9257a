"""Every kind of job is killed before random calls that change a file, with torn writes, until it ends: with the bytes
of an undisturbed run, or a clear refusal; and two runs race for one folder.

DSQUANT_KILLS and DSQUANT_RACES say how many kills each kind of job gets, and how many races there are.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import add_tokenizer, make_pico_r1
from kills import KILLED, REFUSED, contents, run, tear
from small_jobs import changed_copy, noise

import dsquant
from dsquant.errors import InputError
from dsquant.pipeline import job as pipeline
from dsquant.recipes import Recipe, gguf_recipe
from dsquant.releases.recipe import ReleaseRecipe
from dsquant.releases.release_job import run_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("DSQUANT_KILLS", "30"))
RACES = int(os.environ.get("DSQUANT_RACES", "20"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico-r1 of three layers."""
    folder = tmp_path_factory.mktemp("model") / "pico"
    return add_tokenizer(make_pico_r1(folder, outliers=True, num_hidden_layers=3))


def awq(model: Path, text: Path, folder: Path, resume: bool = False, **changes: Any) -> None:
    fields = {
        "model": str(model), "to": ("awq",), "output": folder / "out", "calibration": (str(text),), "samples": 2,
        "seq_len": 16, "group_size": 64, "evaluate": False,
    }  # fmt: skip
    pipeline.run_job(Recipe.checked(**fields | changes), resume=resume)


def gguf(model: Path, text: Path, folder: Path, resume: bool = False, **changes: Any) -> None:
    fields = {
        "model": str(model), "type": "Q4_0", "output": folder / "out", "calibration": (str(text),), "samples": 2,
        "seq_len": 16, "evaluate": False,
    }  # fmt: skip
    pipeline.run_job(gguf_recipe(**fields | changes), resume=resume)


def release(model: Path, text: Path, folder: Path, resume: bool = False) -> None:
    steps = [{"name": "awq", "to": ["awq"], "group_size": 64}, {"name": "q8", "type": "Q8_0", "calibrate": False}]
    calibration = {"texts": [str(text)], "samples": 2, "seq_len": 16}
    fields = {"model": str(model), "output": str(folder / "out"), "calibration": calibration, "quantize": steps}
    run_recipe(ReleaseRecipe.model_validate(fields))


@pytest.fixture(scope="module")
def old(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    awq(model, text_file, folder, preset="compact")
    return folder / "out"


@pytest.fixture(scope="module")
def new(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new") / "model"
    changed_copy(model, folder, noise(0.2, seed=7))
    return folder


@pytest.fixture(scope="module")
def patch(old: Path, new: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patch")
    dsquant.delta(old, new, output=folder / "out", progress=False)
    return folder / "out.patch"


@pytest.fixture
def jobs(model: Path, text_file: Path, request: pytest.FixtureRequest) -> dict[str, Callable[..., Any]]:
    """Kind -> a function of a folder, and whether to resume."""

    def delta(folder: Path, resume: bool = False) -> None:
        old, new = request.getfixturevalue("old"), request.getfixturevalue("new")
        dsquant.delta(old, new, output=folder / "out", resume=resume, progress=False)

    def applied(folder: Path, resume: bool = False) -> None:
        old, patch = request.getfixturevalue("old"), request.getfixturevalue("patch")
        if not (folder / "out").exists():  # a patch is applied again, unless it was
            dsquant.apply_patch(patch, old, output=folder / "out", progress=False)

    make = partial(awq, model, text_file)
    return {
        "quality in three formats": partial(make, to=("awq", "compressed-tensors", "gguf:Q4_0")),
        "best": partial(make, preset="best"),
        "widths by a target": partial(make, to=("compressed-tensors",), preset="compact", target_bits=5.5),
        "gguf": partial(gguf, model, text_file, calibration=()),
        "calibrated gguf": partial(gguf, model, text_file),
        "types by a target": partial(gguf, model, text_file, target_bits=7.0),
        "delta": delta,
        "patch": applied,
        "release": partial(release, model, text_file),
    }


KINDS = (
    "quality in three formats", "best", "widths by a target", "gguf", "calibrated gguf", "types by a target", "delta",
    "patch", "release",
)  # fmt: skip


def whole(folder: Path) -> dict[str, bytes]:
    """What a run has made beside the lock that a recipe's runs share."""
    return {name: content for name, content in contents(folder).items() if not name.startswith(".out.dsquant/")}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_before_any_change_of_a_file_the_output_is_the_undisturbed_one(
    kind: str, jobs: dict[str, Callable[..., Any]], tmp_path: Path
) -> None:
    job, moments = jobs[kind], random.Random(kind)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    job(undisturbed)  # in this process, so that fixtures and lazy imports are there before the first fork
    wanted = whole(undisturbed)
    probe = tmp_path / "probe"
    probe.mkdir()
    code, total = run(partial(job, probe), tmp_path, None)
    assert code == 0 and whole(probe) == wanted
    shutil.rmtree(probe)
    kills = 0
    while kills < KILLS:
        folder, resume, log = tmp_path / "killed", False, []
        folder.mkdir()
        while True:
            # Every second kill falls among the last calls, where an output becomes a finished one.
            place = moments.randrange(total) if moments.random() < 0.5 else total - 1 - moments.randrange(25)
            code, count = run(partial(job, folder, resume=resume), tmp_path, max(place, 0) if kills < KILLS else None)
            log.append((place, code, count))
            if code != KILLED:
                break
            kills, resume, total_left = kills + 1, True, count
            tear(folder, moments)
            total = max(total, total_left)
        assert code in (0, REFUSED), f"{kind}: {log}"
        if code == 0:
            assert whole(folder) == wanted, f"{kind}: {log}"
        shutil.rmtree(folder)


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dsquant.cli", "gguf", "--output", str(folder / "out"), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Waits; the exit code, and what was told."""
    _, told = process.communicate()
    return process.returncode, told


def test_of_two_runs_that_begin_together_one_makes_the_output_alone(
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    moments = random.Random(5)
    common = (str(model), "--type", "Q4_0", "--calibration", str(text_file), "--seq-len", "16", "--no-evaluate")
    recipes = [(*common, "--samples", str(samples)) for samples in (2, 3)]
    wanted = []
    for number, options in enumerate(recipes):
        code, told = end(start(tmp_path / str(number), *options))
        assert code == 0, told
        wanted.append(contents(tmp_path / str(number)))
    began = time.monotonic()
    assert end(start(tmp_path / "timed", *recipes[0]))[0] == 0
    seconds = time.monotonic() - began
    for race in range(RACES):
        folder = tmp_path / f"race-{race}"
        both = [start(folder, *options) for options in recipes]
        time.sleep(moments.random() * 1.3 * seconds)
        first = moments.randrange(2)
        both[first].send_signal(signal.SIGKILL)
        ends = [end(process) for process in both]
        codes = [code for code, _ in ends]
        assert codes[1 - first] in (0, REFUSED), ends
        found = contents(folder) if folder.exists() else {}
        if not any(name.startswith("out/.dsquant-work") for name in found) and found:
            assert found in wanted, f"race {race}: {codes}"
        resumed = [end(start(folder, *options, "--resume"))[0] for options in recipes]
        assert sorted(resumed) in ([0, 2], [0, 3]), f"race {race}: {codes}, {resumed}"
        assert contents(folder) == wanted[resumed.index(0)]


def test_a_resume_beside_a_run_that_is_finishing_leaves_it_finished(
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    moments = random.Random(6)
    (tmp_path / "whole").mkdir()
    gguf(model, text_file, tmp_path / "whole", calibration=())
    wanted = contents(tmp_path / "whole")

    def again(folder: Path) -> None:
        while True:
            try:
                gguf(model, text_file, folder, resume=True, calibration=())
                return
            except InputError as error:
                assert "another dsquant run" in str(error)

    for _ in range(RACES):
        folder = tmp_path / "race"
        folder.mkdir()
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                code, _ = run(partial(again, folder), folder, None)
                os._exit(code)
            children.append(child)
            time.sleep(moments.random() * 0.05)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
        assert contents(folder) == wanted
        shutil.rmtree(folder)
