"""What a job plans to write, from headers alone."""

from pathlib import Path

import pytest

from dsquant.formats.safetensors_target import only_checkpoint
from dsquant.pipeline.inputs import open_model
from dsquant.pipeline.planning import plan_run
from dsquant.recipes import Recipe

GRID = {"bits": 4, "group_size": 32}


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
