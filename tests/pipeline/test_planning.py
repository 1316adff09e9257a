"""What a job plans to write, from headers alone."""

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import LLAMA, add_tokenizer, make_dense

from dsquant.formats.safetensors_target import only_checkpoint
from dsquant.pipeline.inputs import open_model, open_source, resolved
from dsquant.pipeline.notices import planned_warnings
from dsquant.pipeline.planning import plan_run
from dsquant.recipes import Recipe

GRID = {"bits": 4, "group_size": 32}


def test_compressed_tensors_is_symmetric_unless_zero_points_are_asked_for_and_then_engines_are_named(
    tmp_path: Path,
) -> None:
    model = add_tokenizer(make_dense(tmp_path / "model", LLAMA))
    recipe = Recipe.checked(
        model=model, output="out", to="compressed-tensors", device="cpu", calibration="code", **GRID
    )
    source = open_source(resolved(recipe))
    assert source.plan.targets[0].grid.symmetric
    assert not [note for note in planned_warnings(resolved(recipe), source) if "zero points" in note]
    asymmetric = resolved(recipe.model_copy(update={"symmetric": False, "bits": 8}))
    notes = planned_warnings(asymmetric, open_source(asymmetric))
    assert any("zero points" in note and "leave --asymmetric out" in note for note in notes)


def test_what_engines_read_and_a_release_leaves_out_is_written(nano_r1: Path) -> None:
    recipe = Recipe.checked(model=nano_r1, output="out", device="cpu", **GRID)
    checkpoint, skeleton = open_model(str(nano_r1))
    config = {key: value for key, value in checkpoint.config.items() if key != "topk_method"}
    target = only_checkpoint(plan_run(recipe, replace(checkpoint, config=config), skeleton).targets)
    assert (target.config["topk_method"], target.config["scoring_func"]) == ("noaux_tc", "sigmoid")


@pytest.mark.parametrize("preset", ["compact", "best"])
@pytest.mark.parametrize(
    ("to", "kv_b", "stored"),
    [
        ("awq", "keep", {"weight"}),
        ("awq", "quantize", {"qweight", "qzeros", "scales"}),
        ("compressed-tensors", "keep", {"weight"}),
        ("mlx", "quantize", {"weight"}),
    ],
)
def test_kv_b_proj_is_quantized_only_where_that_is_asked_for(
    nano_r1: Path, preset: str, to: str, kv_b: str, stored: set[str]
) -> None:
    mtp = "drop" if to == "mlx" else "quantize"
    recipe = Recipe.checked(model=nano_r1, output="out", to=to, preset=preset, kv_b=kv_b, mtp=mtp, device="cpu", **GRID)
    target = only_checkpoint(plan_run(recipe, *open_model(str(nano_r1))).targets)
    tensors = [tensor for shard in target.shards.shards for tensor in shard.tensors if ".kv_b_proj." in tensor.name]
    assert {tensor.name.rsplit(".", 1)[1] for tensor in tensors} == stored
    assert {tensor.dtype for tensor in tensors if tensor.name.endswith(".weight")} <= {"BF16"}
    skipped = target.config["quantization_config"].get("modules_to_not_convert", [])
    assert ("kv_b_proj" in skipped) == (to == "awq" and kv_b == "keep")
