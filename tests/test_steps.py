"""Steps of the quantization behind options: each alone, a preset's spelled out, and what does not go together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import QWEN2, add_tokenizer, make_dense
from test_awq_job import FAST, contents

import dsquant
from dsquant.distributed import Ranks
from dsquant.errors import UsageError
from dsquant.model.activations import Activations
from dsquant.model.streaming import Routing
from dsquant.model.structure import Mlp
from dsquant.pipeline import _resolved_for
from dsquant.quantization.layer import inputs_of
from dsquant.quantization.steps import rounded_weight
from dsquant.recipe import PRESET_STEPS, STEPS, Recipe
from dsquant.rounding import Grid, round_to_nearest
from dsquant.source.checkpoint import open_checkpoint

COMPACT = PRESET_STEPS["compact"]


def _run(model: Path, text: Path, output: Path, **more: Any) -> Path:
    options = {"to": "compressed-tensors", "preset": "compact", "calibration": str(text), **FAST, **more}
    dsquant.awq(model, output=output, **options)
    return output


def _record(output: Path) -> dict[str, Any]:
    return json.loads((output / "dsquant.json").read_text())


def _weights(output: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(output).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("steps", STEPS)
def test_each_step_alone_makes_an_output_that_verifies(
    pico_r1: Path, text_file: Path, tmp_path: Path, steps: str
) -> None:
    output = _run(pico_r1, text_file, tmp_path / "out", steps=steps)
    assert not dsquant.verify(output, progress=False).findings
    assert _record(output)["recipe"]["steps"] == [steps]
    assert f"preset compact, steps {steps}: " in (output / "README.md").read_text()


@pytest.mark.parametrize("to", ["awq", "compressed-tensors"])
def test_no_steps_are_plain_rounding(pico_r1: Path, text_file: Path, tmp_path: Path, to: str) -> None:
    output = _run(pico_r1, text_file, tmp_path / "out", steps="none", to=to)
    assert "preset compact, no steps: " in (output / "README.md").read_text()
    original, found = open_checkpoint(pico_r1).weights, open_checkpoint(output).weights
    grid, quantized = Grid(4, 64, to == "compressed-tensors"), _record(output)["outputs"][to]["weight_errors"]
    for name in original:
        wanted = original[name]
        if name.removesuffix(".weight") in quantized:
            wanted = round_to_nearest(wanted, grid).dequantize()
        assert torch.equal(found[name], wanted.to(torch.bfloat16).float() if wanted.dim() == 1 else wanted) or (
            torch.allclose(found[name], wanted, rtol=2**-8, atol=0)
        )


@pytest.mark.parametrize("preset", PRESET_STEPS)
def test_a_presets_steps_spelled_out_in_any_order_are_the_same_job(
    pico_r1: Path, text_file: Path, tmp_path: Path, preset: str
) -> None:
    outputs = [
        _run(pico_r1, text_file, tmp_path / name, preset=preset, steps=steps)
        for name, steps in (("default", None), ("spelled", list(reversed(PRESET_STEPS[preset]))))
    ]
    assert contents(outputs[0]) == contents(outputs[1])
    assert f"preset {preset}: " in (outputs[0] / "README.md").read_text()
