"""The model cards of outputs: what the hub reads of them, and the command that makes them again."""

import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from small_jobs import contents

import dsquant
from dsquant.cli import main
from dsquant.pipeline.command import command_of
from dsquant.recipes import Recipe, gguf_recipe
from dsquant.source.license import read_license

SMALL = {"samples": 2, "seq_len": 16, "calibration": "code", "steps": "none", "evaluate": False, "progress": False}


@pytest.fixture(scope="module")
def licensed(nano_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model with a card."""
    model = Path(shutil.copytree(nano_r1, tmp_path_factory.mktemp("licensed") / "small-r1"))
    (model / "README.md").write_text("---\nlicense: mit\nlibrary_name: transformers\n---\n# It\nlicense: other\n")
    return model


@pytest.mark.parametrize(
    ("to", "library", "served", "tag"),
    [
        pytest.param("compressed-tensors", "transformers", "vllm serve . ", "4-bit", marks=pytest.mark.slow),
        ("gguf:Q8_0", "gguf", "llama-server -m small-r1-Q8_0.gguf", "Q8_0"),
    ],
)
def test_a_card_tells_license_library_tags_and_a_command_that_makes_the_same_bytes(
    licensed: Path, tmp_path: Path, to: str, library: str, served: str, tag: str
) -> None:
    dsquant.awq(licensed, output=tmp_path / "out", to=to, group_size=64, preset="compact", **SMALL)
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit" and front["library_name"] == library and tag in front["tags"]
    assert front["pipeline_tag"] == "text-generation" and "base_model" not in front
    assert served in card
    command = shlex.split(card.split("## How it was made")[1].split("```")[1])
    assert command[0] == "dsquant"
    again = CliRunner().invoke(main, [*command[1:], "--output", str(tmp_path / "again"), "--no-evaluate"])
    assert again.exit_code == 0, again.output
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_the_command_of_a_recipe_is_that_of_gguf_where_that_has_its_options() -> None:
    recipe = gguf_recipe(
        output="out", model="a/b", type="Q4_K_M", mtp="keep", tensor_types=["x=F16", "y=Q8_0"], split_max_size="1GiB"
    )
    command = command_of(recipe.lasting())
    assert command == (
        "dsquant gguf a/b --mtp keep --type Q4_K_M --tensor-type x=F16 --tensor-type y=Q8_0 --split-max-size 1073741824"
    )
    assert (
        command_of(gguf_recipe(output="out", model="my model", type="F16").lasting())
        == "dsquant gguf 'my model' --type F16"
    )
    two = Recipe.checked(
        output="out", model="a/b", to=["awq", "gguf:Q4_K_M"], preset="best", steps="scales,follow", symmetric=True
    )
    assert command_of(two.lasting()) == (
        "dsquant awq a/b --to awq --to gguf:Q4_K_M --preset best --steps scales,follow --symmetric"
    )
    assert command_of(two.lasting() | {"scales_from": "00"}) is None


@pytest.mark.parametrize(
    ("card", "found"),
    [
        (
            "---\nlicense: other\nlicense_name: deepseek\nlicense_link: https://a.b/c\n---\n",
            "other deepseek https://a.b/c",
        ),
        ("---\nlicense: 'apache-2.0'\r\n---\n", "apache-2.0"),
        ("---\nlicense: [mit]\nlicense_name: a\\nb: c\n---\n", ""),
        ("license: mit\n", ""),
        ("---\nlicense: mit", ""),
    ],
)
def test_a_license_is_read_from_the_front_matter_alone(tmp_path: Path, card: str, found: str) -> None:
    (tmp_path / "README.md").write_text(card, newline="")
    assert list(read_license(tmp_path, {}).values()) == found.split()


def test_a_license_in_the_config_counts_where_no_card_has_one(tmp_path: Path) -> None:
    assert read_license(tmp_path, {"license": "mit"}) == {"license": "mit"}
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert read_license(tmp_path, {"license": "mit"}) == {"license": "apache-2.0"}
