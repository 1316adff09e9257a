"""An option of a job is declared once, as a field: the command line, the Python API and recipe files read it there."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from pydantic import Field

import dsquant
from dsquant.cli import main
from dsquant.cli.fields import FieldsCommand
from dsquant.deployment.hardware import PlanOptions
from dsquant.errors import UsageError
from dsquant.evaluation.request import EvaluationRequest
from dsquant.options import documented, options_of
from dsquant.recipes import AwqOptions, GgufOptions, Recipe, gguf_recipe
from dsquant.releases.recipe import AwqStep, CalibrationPart, GgufStep, Named, ReleaseRecipe
from dsquant.running import Again, DeltaOptions, Metrics, Push


def parameters(command: str) -> dict[str, click.Parameter]:
    return {str(item.name): item for item in main.commands[command].get_params(click.Context(main.commands[command]))}


@pytest.mark.parametrize(
    ("command", "models"),
    [
        ("awq", (AwqOptions, Again, Push, Metrics)),
        ("gguf", (GgufOptions, Again, Push, Metrics)),
        ("eval", (EvaluationRequest,)),
        ("plan", (PlanOptions,)),
        ("delta", (DeltaOptions,)),
    ],
)
def test_every_field_is_an_option_of_the_command_and_an_argument_in_python(command: str, models: Any) -> None:
    options, function = parameters(command), getattr(dsquant, {"eval": "evaluate"}.get(command, command))
    arguments = inspect.signature(function).parameters
    for name, field in options_of(*models).items():
        assert field.description
        assert name in options and name in arguments and f"{name}: " in function.__doc__
        if not field.is_required() and name != "model":
            assert arguments[name].default == field.default


@pytest.mark.parametrize(("model", "step"), [(AwqOptions, AwqStep), (GgufOptions, GgufStep)])
def test_every_field_of_a_job_is_a_key_of_a_recipe_file(model: Any, step: Any) -> None:
    keys = options_of(ReleaseRecipe, CalibrationPart, step)
    assert options_of(model).keys() <= keys.keys()


def test_a_new_field_is_an_option_an_argument_and_a_key_without_another_line() -> None:
    class More(AwqOptions):
        rounds: int = Field(default=3, ge=1, le=9, description="Rounds of the search.")

    class MoreStep(Named, More):
        pass

    @documented(More)
    def function(**options: Any) -> None:
        """Does it.

        Args:
            **options: its options.
        """

    command = FieldsCommand("more", models=lambda: (More,), callback=lambda **options: click.echo(options["rounds"]))
    invoke = CliRunner().invoke
    assert "[default: 3; 1<=x<=9]" in invoke(command, ["--help"]).output
    assert invoke(command, ["--rounds", "5"]).output == "5\n" and invoke(command, ["--rounds", "10"]).exit_code == 2
    assert str(inspect.signature(function).parameters["rounds"]) == "rounds: int = 3"
    assert "rounds: rounds of the search." in (function.__doc__ or "")
    assert MoreStep.checked(name="a", output="b", rounds=4).rounds == 4


def test_what_is_not_given_is_left_to_the_recipe_and_its_names_are_the_callers(tmp_path: Path) -> None:
    recipe = Recipe.checked(output=str(tmp_path), to="awq", max_shard_size="1MiB", calibration=Path("a.txt"), bits=None)
    assert recipe.output == tmp_path and recipe.to == ("awq",) and recipe.calibration == ("a.txt",)
    assert recipe.max_shard_bytes == 2**20 and recipe.bits == 4 and recipe.lasting()["max_shard_bytes"] == 2**20
    with pytest.raises(UsageError, match=r"^max_shard_size: 'much' is not a size"):
        Recipe.checked(output=tmp_path, max_shard_size="much")
    with pytest.raises(UsageError, match=r"^sampels: unknown key; did you mean 'samples'\?$"):
        dsquant.gguf(output=tmp_path, sampels=3)


def test_gguf_calibrates_where_its_type_quantizes_and_nothing_else_is_given(tmp_path: Path) -> None:
    def texts(**options: Any) -> tuple[str, ...]:
        return gguf_recipe(output=tmp_path, **options).calibration

    assert texts() == texts(calibration=None) == ("r1-mix",)
    assert texts(calibration="none") == texts(type="F16") == texts(imatrix="a.dat") == ()
    assert texts(type="F16", calibration="a.txt") == ("a.txt",)


@pytest.mark.parametrize("options", [{"type": "q4_k"}, {"type": "BF16"}, {"calibration": "none"}])
def test_awq_to_a_type_of_gguf_is_gguf_with_that_type(options: dict[str, Any], tmp_path: Path) -> None:
    of_gguf = gguf_recipe(output=tmp_path, **options)
    type_name = options.pop("type", "Q4_K_M")
    of_awq = Recipe.checked(output=tmp_path, to=f"gguf:{type_name}", **options)
    for field in ("to", "calibration"):
        assert getattr(of_awq, field) == getattr(of_gguf, field)
    assert of_gguf.steps == of_awq.steps
    with pytest.raises(UsageError, match=r"^to: name each format once, found gguf:q4_k, gguf:Q4_K_M$"):
        Recipe.checked(output=tmp_path, to=("gguf:q4_k", "gguf:Q4_K_M"))


@pytest.mark.parametrize(
    ("before", "given", "found"),
    [
        ("", {}, "PASSIVE expandable_segments:True"),
        ("", {"OMP_WAIT_POLICY": "ACTIVE", "PYTORCH_CUDA_ALLOC_CONF": ""}, "ACTIVE "),
        pytest.param("import torch", {}, "None None", marks=pytest.mark.slow),
    ],
)
def test_importing_dsquant_sets_what_torch_reads_when_it_is_imported(
    before: str, given: dict[str, str], found: str
) -> None:
    names = ("OMP_WAIT_POLICY", "PYTORCH_CUDA_ALLOC_CONF")
    script = f"{before}\nimport os, dsquant\nprint(*(os.environ.get(name) for name in {names}))"
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert told.stdout == f"{found}\n"


def test_an_option_that_is_added_at_its_default_changes_no_record_and_no_hash() -> None:
    class Later(Recipe):
        rare_below: int = 256

    class LaterStep(AwqStep):
        rare_below: int = 256

    asked = {"model": "tiny-r1", "output": "out", "bits": 8}
    assert Later.checked(**asked).hash == Recipe.checked(**asked).hash
    assert Later.checked(**asked, rare_below=100).hash != Recipe.checked(**asked).hash
    assert LaterStep.checked(name="a").model_dump() == AwqStep.checked(name="a").model_dump()


def test_a_model_in_the_present_folder_has_the_folders_name() -> None:
    names = {model: Recipe.checked(model=model, output="out").model_name for model in (".", "..", "org/R1", "/m/x/")}
    assert names == {".": Path.cwd().name, "..": Path.cwd().parent.name, "org/R1": "R1", "/m/x/": "x"}
