"""Recipes: what they may say, and what cannot be meant is refused before anything is made."""

import inspect
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from checkpoints import LLAMA, add_tokenizer, make_dense
from small_recipes import content, recipe_of, small, write

import dsquant
from dsquant.cli.run import run as run_command
from dsquant.errors import InputError, UsageError
from dsquant.files.strict_yaml import read_yaml
from dsquant.options import options_of
from dsquant.releases.evaluation import read_recipe_gates
from dsquant.releases.recipe import read_recipe
from dsquant.releases.release_job import run_recipe

pytestmark = pytest.mark.usefixtures("imported")
ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.slow
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
        (
            {"quantize": [{"name": "a", "to": "awq", "samples": 4}]},
            r"quantize\.0\.samples: not a key here; it stands in `calibration` or `evaluate`",
        ),
        (
            {"quantize": [{"name": "a", "type": "Q8_0", "tensor-types": "x"}]},
            r"quantize\.0\.tensor-types: unknown key; did you mean 'tensor_types'\?",
        ),
        ({"on_failure": {"output": "keep"}}, r"on_failure\.output: unknown key; did you mean 'outputs'\?"),
        ({"quantize": [{"name": "a", "to": "awq", "type": "Q8_0"}]}, r"quantize\.0: a step has either `to`.*not both"),
        ({"quantize": [{"name": "a", "too": "awq"}]}, r"quantize\.0: a step has either `to`.*; found name, too"),
        ({"quantize": {"name": "a", "to": "awq"}}, "quantize: expected a list"),
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
        ({"quantize": []}, "quantize: the list is empty"),
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


def test_the_pages_tables_of_keys_are_those_of_the_models_and_its_recipe_is_valid(tmp_path: Path) -> None:
    written = runpy.run_path(str(ROOT / "scripts" / "recipe_keys.py"))["page"]()
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert page == written, "python scripts/recipe_keys.py writes the tables anew"
    assert not re.search(r"\| *\|$", page, re.MULTILINE), "a key has no description"
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(block)
    assert read_recipe(tmp_path / "recipe.yaml").quantize[0].name == "four"


@pytest.mark.parametrize("raw", ["[1", "- a\n- b\n", "\x00", "[" * 500, "a: " + "9" * 5000])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, raw: str) -> None:
    (tmp_path / "recipe.yaml").write_text(raw)
    with pytest.raises((InputError, UsageError), match=r"recipe\.yaml"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_that_gives_a_key_twice_names_both_lines(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: a\noutput: b\nquantize:\n  - {name: a, type: F16}\nmodel: c\n")
    with pytest.raises(InputError, match=r"recipe\.yaml: .* line 5: the key 'model' is given twice, first in line 1"):
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES[:-1], ids=lambda path: path.stem)
def test_a_recipe_runs_with_a_small_model_in_r1s_place(
    path: Path, nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    measured = {"texts": [str(text_file)], "samples": 4, "seq_len": 64}  # enough for intervals
    small = content(nano_r1, text_file, tmp_path / "out", evaluate=measured)
    if path.stem == "r1-distill":
        small["model"] = str(add_tokenizer(make_dense(tmp_path / "llama", LLAMA)))
    recipe = read_yaml(path, "recipe") | {key: small[key] for key in ("model", "output", "calibration", "evaluate")}
    for gate in recipe.get("gates", {"gates": []})["gates"]:
        gate.update({bound: limit for bound, limit in {"at_most": 1000, "at_least": 0}.items() if bound in gate})
    release = dsquant.run(write(tmp_path / "recipe.yaml", recipe), progress=False)
    assert (tmp_path / "out" / "current" / "release.json").is_file()
    assert len(release.evaluation) == sum(len(step.get("to", ["gguf"])) for step in recipe["quantize"])


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
