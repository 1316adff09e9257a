"""What a run publishes, exchanges, keeps and removes, and what its gates say of it."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import put_into_norm
from small_recipes import files, recipe_of, small

from dsquant.errors import GateError, InconclusiveError, InputError
from dsquant.releases.recipe import ReleaseRecipe
from dsquant.releases.release_job import published, run_recipe
from dsquant.reporting.progress import silent
from dsquant.reporting.prometheus import monitored

pytestmark = pytest.mark.usefixtures("imported")


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


@pytest.mark.parametrize("outputs", ["keep", pytest.param("remove", marks=pytest.mark.slow)])
def test_a_failure_keeps_or_removes_and_tells(nano_r1: Path, text_file: Path, tmp_path: Path, outputs: str) -> None:
    told = tmp_path / "told"
    failure = {"outputs": outputs, "command": f'echo "$DSQUANT_STAGE|$DSQUANT_EXIT_CODE|$DSQUANT_ERROR" > {told}'}
    with pytest.raises(GateError):
        run_recipe(failing_late(nano_r1, text_file, tmp_path / "out", on_failure=failure))
    assert told.read_text().startswith("gate|4|") and "mean_kl" in told.read_text()
    assert (tmp_path / ".out.dsquant" / "build" / "q").exists() == (outputs == "keep")
    assert not (tmp_path / "out").exists()


def test_a_gate_that_fails_publishes_nothing_and_a_wider_one_needs_no_second_evaluation(
    nano_r1: Path, text_file: Path, tmp_path: Path
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
    assert f"nothing is published; the outputs are in {tmp_path / '.out.dsquant' / 'build'}." in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_bad_leaves_nothing_beside_the_output(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(nano_r1, model)
    put_into_norm(model, layer=0, value=3e38)
    step = {"name": "a", "to": ["awq"], "group_size": 64}
    with pytest.raises(InputError, match="not finite"):
        run_recipe(small(model, text_file, tmp_path / "new" / "out", quantize=[step]))
    assert not (tmp_path / "new").exists()
