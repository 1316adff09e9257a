"""`--group-size auto` takes the size that fits the most weights, and leaves what it does not fit as it is."""

from pathlib import Path

import pytest
from checkpoints import LLAMA, add_tokenizer, make_dense, make_pico_r1

import dsquant
from dsquant.errors import UsageError
from dsquant.pipeline.inputs import resolved
from dsquant.pipeline.job import preview
from dsquant.recipes import Recipe
from dsquant.source.shards import read_index


@pytest.mark.parametrize(("width", "size", "left"), [(384, 128, 0), (320, 64, 0), (336, 128, 6)])
def test_auto_takes_the_largest_groups_that_fit_the_most_weights(
    width: int, size: int, left: int, text_file: Path, tmp_path: Path
) -> None:
    model = add_tokenizer(make_dense(tmp_path / "model", LLAMA | {"intermediate_size": width}))
    result = dsquant.awq(
        model, output=tmp_path / "out", to="compressed-tensors", group_size="auto", steps="none", samples=1, seq_len=16,
        calibration=text_file, evaluate=False, progress=False,
    )  # fmt: skip
    note = next(warning for warning in result.warnings if "groups of" in warning)
    assert f"groups of {size} weights" in note
    assert ("down_proj and its like, which have 336 columns" in note) == bool(left)
    packed = [name for name in read_index(tmp_path / "out") if name.endswith("weight_packed")]
    assert len(packed) == 14 - left
    assert dsquant.verify(tmp_path / "out", progress=False).ok


def test_a_size_that_does_not_fit_is_refused_where_it_was_asked_for_and_otherwise_auto(tmp_path: Path) -> None:
    model = add_tokenizer(make_dense(tmp_path / "model", LLAMA | {"intermediate_size": 320}))
    options = {"model": str(model), "output": tmp_path / "out", "to": ("compressed-tensors",)}
    with pytest.raises(UsageError, match="--group-size 128; try --group-size 64 or 32 or auto"):
        preview(Recipe.checked(**options, group_size=128))
    asked_nothing = Recipe.checked(**options)
    assert resolved(asked_nothing).group_size == "auto"
    assert any("groups of 64 weights" in note for note in preview(asked_nothing).notes)
    fitting = add_tokenizer(make_dense(tmp_path / "fitting", LLAMA | {"intermediate_size": 384}))
    assert resolved(Recipe.checked(**options | {"model": str(fitting)})).group_size == 128


@pytest.mark.parametrize("to", ["compressed-tensors", "mxfp4"])
def test_a_target_chooses_among_the_linears_that_groups_fit(to: str, text_file: Path, tmp_path: Path) -> None:
    model = add_tokenizer(make_dense(tmp_path / "model", LLAMA | {"intermediate_size": 336}))
    result = dsquant.awq(
        model, output=tmp_path / "out", to=to, target_bits=8, steps="scales", samples=1, seq_len=16,
        calibration=text_file, evaluate=False, progress=False,
    )  # fmt: skip
    assert any("6 linears stay unquantized" in warning for warning in result.warnings)
    names = read_index(tmp_path / "out")
    assert not any("mlp" in name and name.endswith("weight_packed") for name in names)
    assert any(name.endswith("weight_packed") for name in names)
    assert dsquant.verify(tmp_path / "out", progress=False).ok


@pytest.mark.parametrize("to", ["mxfp4", "awq"])
def test_an_output_in_which_nothing_would_be_quantized_is_refused_before_any_work(to: str, tmp_path: Path) -> None:
    model = add_tokenizer(make_pico_r1(tmp_path / "model", moe_intermediate_size=176))
    recipe = Recipe.checked(model=str(model), output=tmp_path / "out", to=(to,), preset="quality", mtp="drop")
    with pytest.raises(UsageError, match=rf"--to {to}, --preset quality: no linear would be quantized.*176 columns"):
        preview(recipe)
