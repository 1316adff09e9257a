"""`dsquant run`: whole releases, verified; locks, kills at every stage, signals."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
from click.testing import CliRunner
from small_recipes import content, files, recipe_of, write

import dsquant
from dsquant.cli import main
from dsquant.errors import InputError
from dsquant.jobs.journal import Journal
from dsquant.releases.recipe import read_recipe
from dsquant.releases.release_job import Release, published, run_recipe

pytestmark = pytest.mark.usefixtures("imported")


def command(recipe: Path, *options: str) -> list[str]:
    return ["run", str(recipe), "--json", *options]


@pytest.fixture(scope="module")
def whole(nano_r1: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, dict[str, bytes]]:
    """An uninterrupted run, and its files."""
    release = run_recipe(recipe_of(nano_r1, text_file, tmp_path_factory.mktemp("whole") / "out"))
    return release, files(release.output)


def test_a_recipe_makes_every_output_evaluates_and_publishes_them(whole: tuple[Release, dict[str, bytes]]) -> None:
    release, found = whole
    assert not release.already_published
    for name in ("awq/awq/config.json", "awq/compressed-tensors/dsquant.json", "q4/pico-r1-Q8_0.gguf", "release.json"):
        assert name in found
    assert "evaluation/report.json" in found
    assert set(release.evaluation) == {"awq/awq", "awq/compressed-tensors", "q4"}
    assert not [path for path in release.output.parent.rglob("*.partial")]
    assert "awq" in release._repr_html_() and "mean KL" in str(release) and "report.html" in str(release)


def test_a_finished_recipe_is_a_no_op_without_torch(
    whole: tuple[Release, dict[str, bytes]], nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    release, before = whole
    path = write(tmp_path / "recipe.yaml", content(nano_r1, text_file, release.output))
    script = (
        "import sys, time; started = time.perf_counter(); from dsquant.cli import main\n"
        f"main(['run', {str(path)!r}], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules; print(time.perf_counter() - started, file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0 and "nothing to do" in found.stdout, found.stderr
    assert float(found.stderr) < 1 or os.getloadavg()[0] > 2
    assert files(release.output) == before


@pytest.mark.slow
def test_a_release_is_verified_with_its_record_its_reports_and_all_its_outputs(
    whole: tuple[Release, dict[str, bytes]], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(whole[0].output, tmp_path / "moved"))
    told = CliRunner().invoke(main, ["verify", str(copy), "--json"])
    found = dsquant.verify(copy, progress=False)
    assert told.exit_code == 0 and json.loads(told.stdout) == found.as_json()
    assert found.ok and set(found.compared) == {"awq/awq", "awq/compressed-tensors", "q4/gguf:Q8_0"}
    assert found.num_files == len(files(copy)) - 1  # release.json has its own seal
    for name in (
        "release.json",
        "evaluation/report.md",
        "evaluation/report.json",
        "q4/dsquant.json",
        "awq/awq/config.json",
    ):
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        damaged = dsquant.verify(copy, progress=False)
        assert {finding.file for finding in damaged.findings} == {name}
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
    (copy / "q5").mkdir()
    (copy / "evaluation" / "old.html").write_text("x")
    (copy / "q4" / "dsquant.json").unlink()
    strays = {finding.file: finding.problem for finding in dsquant.verify(copy, progress=False).findings}
    foreign = "not part of the output"
    assert strays == {"q5": f"an empty folder, {foreign}", "evaluation/old.html": foreign, "q4/dsquant.json": "missing"}


def test_a_release_whose_record_is_damaged_counts_as_none(
    whole: tuple[Release, dict[str, bytes]], nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(whole[0].output, tmp_path / "moved"))
    recipe = recipe_of(nano_r1, text_file, whole[0].output).model_copy(update={"output": copy})
    assert published(recipe) is not None
    raw = (copy / "release.json").read_bytes()
    (copy / "release.json").write_bytes(raw.replace(b'"mean_kl": 0.', b'"mean_kl": 1.', 1))
    assert published(recipe) is None


class Killed(BaseException):
    """Ends a run as a kill would: nothing of dsquant catches it."""


@pytest.mark.parametrize("after_the_line", [pytest.param(value, marks=pytest.mark.slow) for value in (False, True)])
def test_killed_at_every_line_of_the_journal_the_published_bytes_are_the_same(
    whole: tuple[Release, dict[str, bytes]],
    nano_r1: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after_the_line: bool,
) -> None:
    recipe = recipe_of(nano_r1, text_file, tmp_path / "out")
    append, reached = Journal.append, set[str]()

    def dying(journal: Journal, unit: str, **notes: Any) -> None:
        first_time = unit not in reached
        reached.add(unit)
        if first_time and not after_the_line:
            raise Killed
        append(journal, unit, **notes)
        if first_time:
            raise Killed

    monkeypatch.setattr(Journal, "append", dying)
    for _ in range(60):
        try:
            run_recipe(recipe)
            break
        except Killed:
            assert not (tmp_path / "out").exists()
    assert {"begin quantize awq", "model.layers.1", "evaluate", "publish"} <= reached
    assert files(tmp_path / "out") == whole[1]


def wait_for(path: Path, process: forked.Forked) -> None:
    while process.poll() is None and not path.exists():
        time.sleep(0.01)


def journal_has(path: Path, line: str) -> bool:
    return path.exists() and line in path.read_text()


@pytest.mark.slow
def test_killed_by_the_kernel_in_every_stage_the_published_bytes_are_the_same(
    whole: tuple[Release, dict[str, bytes]], nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "recipe.yaml", content(nano_r1, text_file, tmp_path / "out"))
    journal = tmp_path / ".out.dsquant" / "journal.jsonl"
    for stage in ("calibrate", "quantize awq", "quantize q4", "evaluate"):
        process = forked.start(*command(path))
        while process.poll() is None and not journal_has(journal, f"begin {stage}"):
            time.sleep(0.005)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    forked.finish(*command(path))
    assert files(tmp_path / "out") == whole[1]


def test_of_two_runs_at_once_one_works_and_the_other_says_who_holds_the_lock(
    nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    step = {"name": "q", "type": "Q8_0", "calibrate": False}
    path = write(
        tmp_path / "recipe.yaml", content(nano_r1, text_file, tmp_path / "out", quantize=[step], evaluate=None)
    )
    first = forked.start(*command(path))
    wait_for(tmp_path / ".out.dsquant" / "holder.json", first)
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(InputError, match=rf"process {first.pid} on {socket.gethostname()}, since 20\d\d-"):
        run_recipe(read_recipe(path))
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    run_recipe(read_recipe(path, output=tmp_path / "alone"))
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def test_sigterm_ends_with_75_and_the_next_run_goes_on(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    told = f"echo $DSQUANT_STAGE $DSQUANT_EXIT_CODE > {tmp_path}/told"
    changes: dict[str, Any] = {"evaluate": None, "on_failure": {"outputs": "remove", "command": told}}
    changes["quantize"] = [{"name": "awq", "to": "awq", "group_size": 64}]
    path = write(tmp_path / "recipe.yaml", content(nano_r1, text_file, tmp_path / "out", **changes))
    process = forked.start(*command(path))
    while process.poll() is None and not journal_has(tmp_path / ".out.dsquant" / "journal.jsonl", "begin quantize awq"):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75 and "run the same recipe again" in errors, errors
    assert (tmp_path / "told").read_text().split() == ["quantize", "awq", "75"]
    assert (run_recipe(read_recipe(path)).output / "awq" / "config.json").is_file()


def test_the_python_function_takes_a_file_and_changes(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    step = {"name": "q", "type": "Q8_0", "calibrate": False}
    path = write(tmp_path / "r.yaml", content(nano_r1, text_file, Path("x"), quantize=[step], evaluate=None))
    release = dsquant.run(path, output=tmp_path / "out", progress=False)
    assert release.output == tmp_path / "out" and not release.already_published
    assert dsquant.run(path, output=tmp_path / "out", progress=False).already_published
    json.dumps(release.as_json())
