"""`dsquant run`: recipes, locks, kills at every stage, publication, failures."""

import inspect
import json
import os
import re
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
import yaml
from checkpoints import put_into_norm
from click.testing import CliRunner

import dsquant
from dsquant.cli import main
from dsquant.cli.run import run as run_command
from dsquant.errors import GateError, InconclusiveError, InputError, UsageError
from dsquant.jobs.journal import Journal
from dsquant.options import options_of
from dsquant.releases.evaluation import read_recipe_gates
from dsquant.releases.recipe import ReleaseRecipe, read_recipe
from dsquant.releases.release_job import Release, published, run_recipe
from dsquant.reporting.progress import silent
from dsquant.reporting.prometheus import monitored

pytestmark = pytest.mark.usefixtures("imported")
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def content(nano_r1: Path, text_file: Path, output: Path, **changes: Any) -> dict[str, Any]:
    recipe = {
        "model": str(nano_r1),
        "output": str(output),
        "calibration": {"texts": [str(text_file)], "samples": 4, "seq_len": 32},
        "quantize": [
            {"name": "awq", "to": ["awq", "compressed-tensors"], "group_size": 64},
            {"name": "q4", "type": "Q8_0", "calibrate": False},
        ],
        "evaluate": {"texts": [str(text_file)], "samples": 1, "seq_len": 32},
    }
    return recipe | changes


def recipe_of(nano_r1: Path, text_file: Path, output: Path, **changes: Any) -> ReleaseRecipe:
    return ReleaseRecipe.model_validate(content(nano_r1, text_file, output, **changes))


def write(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def command(recipe: Path, *options: str) -> list[str]:
    return ["run", str(recipe), "--json", *options]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def small(nano_r1: Path, text_file: Path, output: Path, **changes: Any) -> ReleaseRecipe:
    step = {"name": "q", "type": "Q8_0", "calibrate": False}
    return recipe_of(nano_r1, text_file, output, **{"quantize": [step], "evaluate": None, **changes})


def test_a_link_is_switched_to_each_new_result_and_back(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    first = small(nano_r1, text_file, tmp_path / "out", publish="symlink")
    step = {"name": "q", "type": "BF16"}
    second = small(nano_r1, text_file, tmp_path / "out", publish="symlink", quantize=[step])
    one = files(run_recipe(first).output)
    target = (tmp_path / "out" / "current").readlink()
    assert (tmp_path / "out" / target / "q" / "pico-r1-Q8_0.gguf").is_file()
    assert files(run_recipe(second).output) != one
    assert (tmp_path / "out" / target).is_dir(), "the older result stays"
    assert published(first) is None
    assert files(run_recipe(first).output) == one
    assert (tmp_path / "out" / "current").readlink() == target


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2")
def test_an_output_behind_a_link_is_exchanged_where_it_lies(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    run_recipe(small(nano_r1, text_file, tmp_path / "out"))
    run_recipe(small(nano_r1, text_file, tmp_path / "out", quantize=[{"name": "b", "type": "BF16"}]))
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "real" / "b").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2")
def test_an_older_result_is_exchanged_and_nothing_of_it_stays(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    run_recipe(small(nano_r1, text_file, tmp_path / "out"))
    run_recipe(small(nano_r1, text_file, tmp_path / "out", quantize=[{"name": "b", "type": "BF16"}]))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"b", "release.json"}
    assert {path.name for path in (tmp_path / ".out.dsquant").iterdir()} <= {"lock", "holder.json"}


Q8 = {"name": "q", "type": "Q8_0", "calibrate": False}


def failing_late(model: Path, text: Path, output: Path, **changes: Any) -> ReleaseRecipe:
    """A recipe whose gate fails after everything has been made."""
    evaluate = {"texts": [str(text)], "samples": 2, "seq_len": 80}
    gates = {"gates": [{"metric": "mean_kl", "at_most": 0.0}]}
    return recipe_of(model, text, output, quantize=[Q8], evaluate=evaluate, gates=gates, **changes)


def test_a_step_that_has_not_changed_is_not_made_again(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError):
        run_recipe(failing_late(nano_r1, text_file, tmp_path / "out"))
    made = tmp_path / ".out.dsquant" / "build" / "q" / "pico-r1-Q8_0.gguf"
    before = made.stat().st_mtime_ns
    steps = [Q8, {"name": "good", "type": "BF16"}]
    release = run_recipe(small(nano_r1, text_file, tmp_path / "out", quantize=steps))
    assert (release.output / "q" / "pico-r1-Q8_0.gguf").stat().st_mtime_ns == before
    assert {path.name for path in release.output.iterdir()} == {"q", "good", "release.json"}


def test_steps_count_only_where_a_recipe_names_them(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    step = {"name": "a", "to": ["compressed-tensors"], "preset": "compact", "group_size": 64}
    recipes = [
        small(nano_r1, text_file, tmp_path / "out", quantize=[step | more])
        for more in ({}, {"steps": None}, {"steps": "clip, compensate"}, {"steps": ["clip", "compensate"]})
    ]
    assert "steps" not in recipes[0].model_dump(mode="json")["quantize"][0]
    assert recipes[0].hash == recipes[1].hash != recipes[2].hash == recipes[3].hash
    release = run_recipe(recipes[2])
    record = json.loads((release.output / "a" / "dsquant.json").read_text())
    assert record["recipe"]["steps"] == ["clip", "compensate"]


def test_a_source_that_changed_makes_the_recipe_run_again(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    model = shutil.copytree(nano_r1, tmp_path / "model")
    recipe = small(model, text_file, tmp_path / "out")
    one = files(run_recipe(recipe).output)
    assert published(recipe) is not None
    shard = sorted(model.glob("*.safetensors"))[0]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert published(recipe) is None
    assert files(run_recipe(recipe).output) != one


@pytest.mark.parametrize("publish", ["rename", "symlink"])
def test_a_folder_that_is_somebody_elses_is_refused(
    nano_r1: Path, text_file: Path, tmp_path: Path, publish: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        run_recipe(small(nano_r1, text_file, tmp_path / "out", publish=publish))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("outputs", ["keep", "remove"])
def test_a_failure_keeps_or_removes_and_tells(nano_r1: Path, text_file: Path, tmp_path: Path, outputs: str) -> None:
    told = tmp_path / "told"
    failure = {"outputs": outputs, "command": f'echo "$DSQUANT_STAGE|$DSQUANT_EXIT_CODE|$DSQUANT_ERROR" > {told}'}
    with pytest.raises(GateError):
        run_recipe(failing_late(nano_r1, text_file, tmp_path / "out", on_failure=failure))
    assert told.read_text().startswith("gate|4|") and "mean_kl" in told.read_text()
    assert (tmp_path / ".out.dsquant" / "build" / "q").exists() == (outputs == "keep")
    assert not (tmp_path / "out").exists()


def test_a_gate_that_fails_publishes_nothing_and_a_wider_one_needs_no_second_evaluation(
    whole: tuple[Release, dict[str, bytes]], nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    def with_limit(limit: float) -> ReleaseRecipe:
        gates = {"gates": [{"metric": "mean_kl", "at_most": limit}]}
        step = {"name": "q", "type": "Q8_0", "calibrate": False}
        evaluate = {"texts": [str(text_file)], "samples": 3, "seq_len": 80}
        return recipe_of(nano_r1, text_file, tmp_path / "out", quantize=[step], evaluate=evaluate, gates=gates)

    with pytest.raises(GateError, match="mean_kl"):
        run_recipe(with_limit(0.0))
    assert not (tmp_path / "out").exists()
    journal = tmp_path / ".out.dsquant" / "journal.jsonl"
    made = journal.read_text()
    report = json.loads((tmp_path / ".out.dsquant" / "build" / "evaluation" / "report.json").read_text())
    (estimate,) = (text["mean_kl"]["estimate"] for text in report["candidates"][0]["texts"].values())
    metrics = tmp_path / "dsquant.prom"
    with pytest.raises(GateError, match="mean_kl"), monitored(silent, metrics) as report:
        run_recipe(with_limit(estimate * 0.01), report)
    assert 'dsquant_gate_passed{gate="q mean_kl text.txt"} 0.0' in metrics.read_text()
    added = journal.read_text().removeprefix(made)
    assert "begin gate" in added and "begin evaluate" not in added
    release = run_recipe(with_limit(10.0))
    assert release.gates["verdict"] == "pass"
    published_report = json.loads((release.output / "evaluation" / "report.json").read_text())
    assert published_report["verdict"] == "pass"
    assert published_report["candidates"][0]["gates"][0]["limit"] == 10.0


def test_an_inconclusive_gate_ends_with_5(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    def with_limit(limit: float) -> ReleaseRecipe:
        changes: dict[str, Any] = {"gates": {"gates": [{"metric": "mean_kl", "at_most": limit}]}}
        changes["evaluate"] = {"texts": [str(text_file)], "samples": 3, "seq_len": 80}
        return small(nano_r1, text_file, tmp_path / "out", **changes)

    with pytest.raises(GateError):
        run_recipe(with_limit(0.0))
    report = json.loads((tmp_path / ".out.dsquant" / "build" / "evaluation" / "report.json").read_text())
    (found,) = (text["mean_kl"] for text in report["candidates"][0]["texts"].values())
    assert found["low"] < found["high"]
    with pytest.raises(InconclusiveError, match="mean_kl") as caught:
        run_recipe(with_limit(found["estimate"]))
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "gates", [{"gates": [{"metric": "mean_k", "at_most": 1}]}, {"gates": [{"metric": "mean_kl", "at_least": 1}]}]
)
def test_gates_that_cannot_be_meant_are_refused_before_anything_is_made(
    nano_r1: Path, text_file: Path, tmp_path: Path, gates: Any
) -> None:
    with pytest.raises(InputError, match="gates"):
        run_recipe(recipe_of(nano_r1, text_file, tmp_path / "out", gates=gates))
    assert not (tmp_path / ".out.dsquant").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    recipe = read_recipe(path)
    gates = read_recipe_gates(recipe)
    assert (gates is None) == (recipe.gates is None)


def test_the_shipped_recipes_are_those_that_the_issue_names() -> None:
    assert {path.stem for path in RECIPES} == {"r1-awq-4bit", "r1-compact", "r1-gguf", "r1-distill", "tiny-r1-all"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibraton": {}}, r"recipe\.yaml: calibraton: unknown key; did you mean 'calibration'\?"),
        ({"evaluate": {"sample": 3}}, r"evaluate\.sample: unknown key; did you mean 'samples'\?"),
        ({"on_failure": {"comand": "x"}}, r"on_failure\.comand: unknown key; did you mean 'command'\?"),
        (
            {"quantize": [{"name": "a", "to": "awq", "presett": "quality"}]},
            r"quantize\.0\.presett: unknown key; did you mean 'preset'\?",
        ),
        (
            {"quantize": [{"name": "a", "type": "Q8_0", "imatrx": "x"}]},
            r"quantize\.0\.imatrx: unknown key; did you mean 'imatrix'\?",
        ),
        ({"quantize": [{"name": "a", "to": "awq", "type": "Q8_0"}]}, r"quantize\.0: a step has either `to`.*not both"),
        ({"quantize": [{"name": "a" * 300, "to": "awq"}]}, r"quantize\.0\.name: String should have at most 100"),
        ({"evaluate": {"prompts": "python", "execute": True}}, r"evaluate: execute runs code .* allow_code_execution"),
        (
            {"quantize": [{"name": "one", "to": ["awq"], "steps": ["clip", "fold"]}]},
            r"quantize\.0\.steps: 'fold': give some of scales, clip",
        ),
        ({"zzz": 1}, r"zzz: unknown key; there are calibration, device"),
        *(
            ({"quantize": [{"name": name, "to": "awq"}]}, r"quantize\.0\.name: String should match")
            for name in ("a b", "a/b", "a\\b", "Evaluation", "a.", ".", "..", "", "a\n")
        ),
        *(
            ({"quantize": [{"name": name, "to": "awq"}]}, rf"quantize: a step cannot be called {re.escape(name)}: ")
            for name in ("evaluation", "release.json", "release.json.partial", "evaluation.partial")
        ),
        ({"quantize": [{"name": "a", "to": "awq"}, {"name": "a", "type": "Q8_0"}]}, "a is there twice"),
        ({"quantize": []}, "quantize: Tuple should have at least 1 item"),
        ({"evaluate": None, "gates": {"gates": []}}, "gates need an evaluate section"),
        ({"memory_budget": "lots"}, r"memory_budget: 'lots' is not a size"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_keys_path(
    nano_r1: Path, text_file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "recipe.yaml", content(nano_r1, text_file, tmp_path / "out", **changes))
    with pytest.raises(UsageError, match=message):
        read_recipe(path)


def test_the_recipe_in_the_commands_help_is_valid(tmp_path: Path) -> None:
    text = inspect.getdoc(run_command.callback)
    assert text is not None
    shown = text[text.index("model: tiny-r1") : text.index("Entries with")]
    (tmp_path / "recipe.yaml").write_text(shown)
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert [step.name for step in recipe.quantize] == ["four", "mixed", "k-quants"]
    keys = {key for step in recipe.quantize for key in options_of(type(step))}
    assert all(re.search(rf"\b{key}\b", text) for key in keys), keys


@pytest.mark.parametrize("raw", ["[1", "- a\n- b\n", "\x00", "[" * 20000, "a: " + "9" * 5000])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, raw: str) -> None:
    (tmp_path / "recipe.yaml").write_text(raw)
    with pytest.raises((InputError, UsageError), match=r"recipe\.yaml"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_that_gives_a_key_twice_names_both_lines(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: a\noutput: b\nquantize:\n  - {name: a, type: F16}\nmodel: c\n")
    with pytest.raises(InputError, match=r"recipe\.yaml: .* line 5: the key 'model' is given twice, first in line 1"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_model_that_is_bad_leaves_nothing_beside_the_output(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(nano_r1, model)
    put_into_norm(model, layer=0, value=3e38)
    step = {"name": "a", "to": ["awq"], "group_size": 64}
    with pytest.raises(InputError, match="not finite"):
        run_recipe(small(model, text_file, tmp_path / "new" / "out", quantize=[step]))
    assert not (tmp_path / "new").exists()


def test_the_python_function_takes_a_file_and_changes(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    step = {"name": "q", "type": "Q8_0", "calibrate": False}
    path = write(tmp_path / "r.yaml", content(nano_r1, text_file, Path("x"), quantize=[step], evaluate=None))
    release = dsquant.run(path, output=tmp_path / "out", progress=False)
    assert release.output == tmp_path / "out" and not release.already_published
    assert dsquant.run(path, output=tmp_path / "out", progress=False).already_published
    json.dumps(release.as_json())


@pytest.mark.slow
def test_the_recipe_for_everything_runs_on_tiny_r1(tmp_path: Path) -> None:
    release = dsquant.run(RECIPES[0].parent / "tiny-r1-all.yaml", output=tmp_path / "out", progress=False)
    assert len(release.evaluation) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"texts": ["nowhere.txt"]}}, "nowhere.txt"),
        ({"evaluate": {"texts": ["code"], "seq_len": 32, "prompts": "nowhere.jsonl"}}, "nowhere.jsonl"),
        (
            {
                "evaluate": {"texts": ["code"], "seq_len": 32},
                "gates": {"gates": [{"metric": "code_bleu_drop", "at_most": 1}]},
            },
            "code_bleu_drop",
        ),
        (
            {"quantize": [{"name": "a", "type": "Q8_0"}, {"name": "b", "type": "F32", "tensor_types": ["zzz=Q9"]}]},
            "step b: .*Q9",
        ),
        (
            {"quantize": [{"name": "a", "type": "Q8_0"}, {"name": "b", "type": "Q4_K_M", "target_bits": 1}]},
            "step b: --target-bits 1.0: .* gives from",
        ),
    ],
)
def test_a_mistake_in_a_later_step_is_found_before_the_first(
    nano_r1: Path, text_file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((InputError, UsageError), match=message):
        run_recipe(recipe_of(nano_r1, text_file, tmp_path / "out", **changes))
    assert not (tmp_path / ".out.dsquant").exists()
