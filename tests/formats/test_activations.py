"""compressed-tensors whose engines round activations: W4AFP8 and W4A8."""

import re
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FP8, PICO_R1
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

import dsquant
from dsquant.deployment.planned import planned_checkpoint
from dsquant.errors import UsageError
from dsquant.formats.compressed_tensors import CompressedTensors
from dsquant.formats.safetensors_target import SafetensorsTarget, only_checkpoint
from dsquant.pipeline.planning import plan_run
from dsquant.recipes import Recipe

WIDE = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}


def planned(folder: Path, **options: Any) -> SafetensorsTarget:
    config = {**PICO_R1, **WIDE, "quantization_config": FP8}
    fields = {"to": "compressed-tensors", "symmetric": True, "preset": "quality", "device": "cpu", **options}
    recipe = Recipe.checked(model=str(folder), output=folder / "out", **fields)
    return only_checkpoint(plan_run(recipe, *planned_checkpoint(folder, config)).targets)


@pytest.mark.parametrize(("kind", "preset"), [("fp8", "W4AFP8"), ("int8", "W4A8")])
@pytest.mark.parametrize("rest", ["fp8", "bf16"])
def test_the_groups_are_those_of_compressed_tensors_presets(tmp_path: Path, kind: str, preset: str, rest: str) -> None:
    with_them, without = (planned(tmp_path, rest=rest, **more) for more in ({"activations": kind}, {}))
    assert with_them.shards == without.shards
    config = QuantizationConfig.model_validate(with_them.config["quantization_config"])
    four, *others = config.config_groups.values()
    theirs = preset_name_to_scheme(preset, ["Linear"]).input_activations
    for part in ("num_bits", "type", "symmetric", "strategy", "dynamic"):
        assert getattr(four.input_activations, part) == getattr(theirs, part), part
    assert [group.format for group in others] == ["float-quantized"] * (rest == "fp8")
    assert all(group.input_activations.group_size == 128 for group in others)


def matched(config: dict[str, Any], module: str) -> dict[str, Any]:
    """The group in which vLLM 0.22 finds a module: by its name, then by its class."""
    groups = config["config_groups"].values()
    named = [group for group in groups for one in group["targets"] if re.match(one.removeprefix("re:"), module)]
    return (named or [group for group in groups if "Linear" in group["targets"]])[0]


@pytest.mark.parametrize("rest", ["fp8", "bf16"])
def test_linears_whose_fused_rows_no_kernel_takes_keep_their_inputs(tmp_path: Path, rest: str) -> None:
    target = planned(tmp_path, rest=rest, preset="compact", activations="fp8")
    inputs = {"q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"}
    attention = "model.layers.1.self_attn"
    config = target.config["quantization_config"]
    for module in (*target.linears, *(f"{attention}.{name}" for name in inputs), "model.layers.0.mlp.gate_up_proj"):
        group = matched(config, module)
        assert group["weights"]["num_bits"] == 4, module
        odd = module.rpartition(".")[2] in inputs
        assert (group["input_activations"] is None) == odd, module
    assert any("keep inputs in BF16" in note and "q_a_proj" in note for note in target.notes)
    assert matched(config, f"{attention}.kv_b_proj")["weights"]["num_bits"] == (8 if rest == "fp8" else 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "fp8", "group_size": 64}, "4 bits in groups of 128 without zero points"),
        ({"activations": "int8", "bits": 8}, "4 bits in groups of 128"),
        ({"activations": "fp8", "target_bits": 5.0}, "leave --target-bits 5.0 out"),
    ],
)
def test_what_no_engine_takes_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(tmp_path, **options)


def test_experts_that_cutlass_does_not_take_are_refused(narrow_r1: Path, tmp_path: Path) -> None:
    fields = {
        "output": tmp_path / "out", "activations": "fp8", "progress": False, "calibration": "code", "group_size": 128,
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"experts\.0\.\w+_proj has \d+ columns|multiple of --group-size"):
        dsquant.awq(narrow_r1, **fields)
    with pytest.raises(UsageError, match="awq has no inputs of that kind; take --to compressed-tensors"):
        dsquant.awq(narrow_r1, to="awq", **fields)
    assert not (tmp_path / "out").exists()


def test_notes_name_the_engines() -> None:
    known = CompressedTensors()
    assert "SGLang 0.5.23 only with --rest bf16" in known.activation_notes("fp8", True, True)[0]
    assert "on Arm alone" in known.activation_notes("int8", True, False)[0]
    assert "Arm" not in known.activation_notes("int8", False, False)[0]
