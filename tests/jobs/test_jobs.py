"""An output folder belongs to one run at a time, whatever is decided about it is decided under its lock, and a kill at
any place leaves what the next run understands."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kills import KILLED, contents, run

import dsquant
from dsquant.errors import InputError, Interrupted
from dsquant.jobs import folder as jobs
from dsquant.pipeline import job as pipeline
from dsquant.recipes import Recipe, gguf_recipe

WORK = ".dsquant-work"


def recipe(model: Path, output: Path, **changes: Any) -> Recipe:
    fields = {"model": str(model), "type": "Q8_0", "output": output, "calibration": (), "evaluate": False}
    return gguf_recipe(**fields | changes)


@pytest.fixture(scope="module")
def finished(nano_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    pipeline.run_job(recipe(nano_r1, output))
    return output


@pytest.fixture(scope="module")
def all_done(nano_r1: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job all of whose files are whole, stopped before its work folder is removed."""
    output = tmp_path_factory.mktemp("all-done") / "out"

    def stop(progress: Any) -> None:
        if progress.stage == "hash" and progress.done == progress.total:
            raise Interrupted("the test stopped it")

    with pytest.raises(Interrupted):
        pipeline.run_job(recipe(nano_r1, output), report=stop)
    assert (output / WORK).is_dir() and (output / "dsquant.json").is_file()
    return output


def test_no_second_run_begins_on_a_folder_while_the_first_still_reads_its_source(
    nano_r1: Path, finished: Path, tmp_path: Path
) -> None:
    output, refused = tmp_path / "out", []

    def begin_another(progress: Any) -> None:
        if progress.stage == "scan" and progress.done == 0:
            with pytest.raises(InputError, match="another dsquant run is working") as error:
                pipeline.run_job(recipe(nano_r1, output, type="Q4_0"))
            refused.append(error)

    pipeline.run_job(recipe(nano_r1, output), report=begin_another)
    assert refused
    assert contents(output).keys() == contents(finished).keys()


def test_a_run_that_ends_before_the_job_begins_leaves_nothing(nano_r1: Path, tmp_path: Path) -> None:
    def stop(progress: Any) -> None:
        raise Interrupted("the test stopped it")

    with pytest.raises(Interrupted):
        pipeline.run_job(recipe(nano_r1, tmp_path / "made" / "out"), report=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_restart_that_ends_before_the_job_begins_leaves_the_finished_output(
    nano_r1: Path, finished: Path, tmp_path: Path
) -> None:
    def stop(progress: Any) -> None:
        raise Interrupted("the test stopped it")

    output = tmp_path / "out"
    shutil.copytree(finished, output)
    with pytest.raises(Interrupted):
        pipeline.run_job(recipe(nano_r1, output, type="Q4_0"), restart=True, report=stop)
    assert contents(output) == contents(finished)


@pytest.mark.parametrize(("options", "outcome"), [({"resume": True}, "finished"), ({}, "refused")])
def test_what_was_seen_before_the_lock_is_looked_at_again_under_it(
    nano_r1: Path,
    all_done: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    outcome: str,
) -> None:
    output = tmp_path / "out"
    arriving = tmp_path / "arriving"
    shutil.copytree(all_done, arriving)
    if options:
        arriving.rename(output)

    @contextmanager
    def after_the_other_run(folder: Path, subject: Path) -> Iterator[Callable[[], bool]]:
        if arriving.exists():
            arriving.rename(output)
        jobs.remove_work(output)  # the other run's last step
        with exclusive(folder, subject) as is_locked:
            yield is_locked

    exclusive = jobs.exclusive
    monkeypatch.setattr(jobs, "exclusive", after_the_other_run)
    if outcome == "finished":
        assert pipeline.run_job(recipe(nano_r1, output), **options).already_finished
    else:
        with pytest.raises(InputError, match="a finished output"):
            pipeline.run_job(recipe(nano_r1, output), **options)
    whole = {name: content for name, content in contents(all_done).items() if not name.startswith(WORK)}
    assert contents(output) == whole


def test_a_run_that_has_finished_leaves_the_work_folder_of_the_next_alone(
    nano_r1: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    with jobs.held(output, recipe(nano_r1, output), resume=False, restart=True):
        jobs.remove_work(output)  # its last step; the next run begins before it has ended
        (output / WORK).mkdir()
        (output / WORK / "lock").touch()
        (output / WORK / "sensitivity-inputs.f32").touch()
    assert sorted(path.name for path in (output / WORK).iterdir()) == ["lock", "sensitivity-inputs.f32"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux")
@pytest.mark.timeout(20)
def test_where_no_folder_can_be_made_nobody_waits_for_one() -> None:
    with pytest.raises(FileNotFoundError, match="/proc/out"), jobs.exclusive(Path("/proc/out"), Path("/proc/out")):
        pass


def test_a_lock_is_of_the_folder_that_lies_there_now(tmp_path: Path) -> None:
    with jobs.exclusive(tmp_path / "work", tmp_path) as is_locked:
        assert is_locked()
        (tmp_path / "work").rename(tmp_path / "away")
        assert not is_locked()
        with jobs.exclusive(tmp_path / "work", tmp_path) as is_locked_by_the_next:
            assert is_locked_by_the_next() and not is_locked()
            with (
                pytest.raises(InputError, match=f"another dsquant run is working .* process {os.getpid()} on"),
                jobs.exclusive(tmp_path / "work", tmp_path),
            ):
                pass


def test_killed_anywhere_while_the_work_folder_goes_away_the_output_is_finished_or_resumable(
    nano_r1: Path, all_done: Path, tmp_path: Path
) -> None:
    whole = {name: content for name, content in contents(all_done).items() if not name.startswith(WORK)}
    again, kills = 0, 0
    while True:
        output = tmp_path / f"out-{kills}"
        shutil.copytree(all_done, output)
        code, _ = run(partial(jobs.remove_work, output), output, kills)
        state = jobs.found_in(output)
        assert state in ("interrupted", "finished")
        again += state == "interrupted"
        if state == "finished":
            assert pipeline.run_job(recipe(nano_r1, output), resume=True).already_finished
            assert contents(output) == whole
        else:
            assert contents(output) == contents(all_done)
        shutil.rmtree(output)
        if code == 0:
            break
        assert code == KILLED
        kills += 1
    assert kills >= 5 and again == 1, "only a kill before the one rename leaves an interrupted job"


@pytest.mark.slow
def test_killed_anywhere_while_room_is_made_for_another_job_nothing_strays(
    nano_r1: Path, finished: Path, all_done: Path, tmp_path: Path
) -> None:
    for before in (finished, all_done):
        kills = 0
        while True:
            output = tmp_path / "out"
            shutil.copytree(before, output)
            (output / "mine.txt").write_text("not dsquant's")
            (output / WORK).mkdir(exist_ok=True)
            code, _ = run(partial(jobs._clear, output), output, kills)
            run(partial(jobs._clear, output), output, None)  # what --restart and --resume both do next
            assert {name for name in contents(output) if not name.startswith(WORK)} == {"mine.txt"}
            assert {path.name for path in (output / WORK).iterdir()} <= {"lock", "holder.json", *jobs.EARLIER.values()}
            shutil.rmtree(output)
            if code == 0:
                break
            kills += 1
        assert kills >= 3


@pytest.mark.parametrize(
    "name", [5, "\0", ".", "..", "../outside", "/etc/hostname", "link/victim", "", "a/" * 2500 + "b"]
)
def test_a_restart_removes_nothing_outside_of_its_folder(
    name: Any, nano_r1: Path, finished: Path, tmp_path: Path
) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    shutil.copytree(finished, output)
    elsewhere.mkdir()
    for victim in (elsewhere / "victim", tmp_path / "outside"):
        victim.write_text("keep me")
    (output / "link").symlink_to(elsewhere)
    record = json.loads((output / "dsquant.json").read_bytes())
    record["files"] = [*record["files"], name]
    (output / "dsquant.json").write_text(json.dumps(record))
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"its record|is a link"):
        pipeline.run_job(recipe(nano_r1, output), restart=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [WORK, ".dsquant-removed"])
def test_a_link_in_the_place_of_a_work_folder_is_refused(
    name: str, nano_r1: Path, finished: Path, tmp_path: Path
) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    shutil.copytree(finished, output)
    elsewhere.mkdir()
    (elsewhere / "job.json").write_text("{}")
    (output / name).symlink_to(elsewhere)
    for options in ({}, {"resume": True}, {"restart": True}):
        with pytest.raises(InputError, match="a link or a file"):
            pipeline.run_job(recipe(nano_r1, output), **options)
    assert list(contents(elsewhere)) == ["job.json"]


def test_an_empty_work_folder_is_no_job(nano_r1: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / WORK).mkdir(parents=True)
    (output / WORK / "lock").touch()
    assert not dsquant.gguf(nano_r1, type="Q8_0", output=output, calibration=(), evaluate=False).already_finished
    assert contents(output).keys() == contents(finished).keys()


@pytest.mark.parametrize("name", ["journal.jsonl", "holder.json.partial", "job.json.partial"])
def test_a_new_job_writes_through_no_link_in_its_folder(name: str, nano_r1: Path, tmp_path: Path) -> None:
    work, victim = tmp_path / "out" / WORK, tmp_path / "victim"
    work.mkdir(parents=True)
    victim.write_text("keep me")
    (work / name).symlink_to(victim)
    for options in ({}, {"resume": True}, {"restart": True}):
        with pytest.raises(InputError, match="is a link"):
            pipeline.run_job(recipe(nano_r1, tmp_path / "out"), **options)
    assert victim.read_text() == "keep me"


def test_a_new_job_reads_nothing_that_lies_in_its_work_folder(nano_r1: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / WORK).mkdir(parents=True)
    (output / WORK / "journal.jsonl").write_text("of no job")
    pipeline.run_job(recipe(nano_r1, output))
    assert contents(output) == contents(finished)


@pytest.mark.parametrize(
    "name",
    [f"{WORK}/lock", f"{WORK}/holder.json", f"{WORK}/holder.json.partial", f"{WORK}/earlier-job.json", "GGUF.partial"],
)
def test_a_folder_in_the_place_of_a_file_is_refused_by_name(
    name: str, nano_r1: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    path = output / name.replace("GGUF", next(finished.glob("*.gguf")).name)
    path.mkdir(parents=True)
    before = contents(output)
    with pytest.raises(InputError, match=path.name):
        pipeline.run_job(recipe(nano_r1, output), restart=True)
    assert contents(output) == before


def test_an_output_that_is_a_link_to_nothing_or_no_text_is_refused(nano_r1: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").symlink_to(tmp_path / "absent")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in ("nothing", "circle", "circle/out"):
        with pytest.raises(InputError, match="a link that leads to no folder"):
            pipeline.run_job(recipe(nano_r1, tmp_path / name))
    with pytest.raises(InputError, match="cannot be a folder's name"):
        pipeline.run_job(recipe(nano_r1, tmp_path / "\ud800"))
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("change", [{"warnings": 5}, {"precision": [1]}, {"source": {"bytes": "x", "bf16_bytes": 1}}])
def test_garbage_in_a_finished_record_is_found_before_it_is_shown(
    change: dict[str, Any], nano_r1: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    record = json.loads((output / "dsquant.json").read_bytes())
    (output / "dsquant.json").write_text(json.dumps(record | change))
    with pytest.raises(InputError, match=r"dsquant\.json.*start over with --restart"):
        pipeline.run_job(recipe(nano_r1, output), resume=True)
