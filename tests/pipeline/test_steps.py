"""Steps of the quantization behind options: each alone, a preset's spelled out, and what does not go together."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import QWEN2, add_tokenizer, make_dense, make_pico_r1
from shapes import NARROW
from small_jobs import FAST, contents

import dsquant
from dsquant.errors import UsageError
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.activations import Activations
from dsquant.model.streaming import Routing
from dsquant.model.structure import Mlp
from dsquant.pipeline.inputs import resolved
from dsquant.presets import PRESET_STEPS, STEPS, WIDEST_FOR_PREDICTIONS, Step, default_steps, preset_and_steps
from dsquant.quantization.mlp_inputs import inputs_of
from dsquant.quantization.steps import rounded_weight
from dsquant.recipes import Recipe
from dsquant.schemes import Grid, round_to_nearest


def _run(model: Path, text: Path, output: Path, **more: Any) -> Path:
    options = {"to": "compressed-tensors", "preset": "compact", "calibration": str(text), **FAST, "steps": None, **more}
    dsquant.awq(model, output=output, **options)
    return output


def _record(output: Path) -> dict[str, Any]:
    return json.loads((output / "dsquant.json").read_text())


def _changed(one: Path, other: Path) -> set[str]:
    """The parameters that differ between two outputs."""
    first, second = (open_checkpoint(output).weights for output in (one, other))
    return {name for name in first if not torch.equal(first[name], second[name])}


def _experts_of(parameters: set[str]) -> set[tuple[int, int]]:
    """Layer and number of the routed experts that parameters belong to, which all must."""
    assert all(".mlp.experts." in name for name in parameters)
    return {(int(name.split(".")[2]), int(name.split(".")[5])) for name in parameters}


ALONE = [step for step in STEPS if step != "predictions"]


@pytest.mark.parametrize(
    "steps", [step if step == "compensate" else pytest.param(step, marks=pytest.mark.slow) for step in ALONE]
)
def test_each_step_alone_makes_an_output_that_verifies(
    narrow_r1: Path, text_file: Path, tmp_path: Path, steps: str
) -> None:
    output = _run(narrow_r1, text_file, tmp_path / "out", steps=steps)
    assert not dsquant.verify(output, progress=False).findings
    assert _record(output)["recipe"]["steps"] == [steps]
    assert f"preset compact, steps {steps}: " in (output / "README.md").read_text()


@pytest.mark.parametrize(
    "steps",
    [
        "compensate,follow",
        pytest.param("scales,clip,gate-weights", marks=pytest.mark.slow),
        pytest.param("compensate,follow,descend,predictions", marks=pytest.mark.slow),
    ],
)
def test_experts_without_any_token_are_quantized_all_the_same(
    narrow_r1: Path, text_file: Path, tmp_path: Path, steps: str
) -> None:
    output = _run(narrow_r1, text_file, tmp_path / "out", steps=steps, samples=1, seq_len=8)
    assert 0 in _record(output)["layers"][1]["tokens_per_expert"]
    assert any("none were added" in warning for warning in _record(output)["warnings"])
    assert not dsquant.verify(output, progress=False).findings


@pytest.mark.parametrize("to", ["awq", "compressed-tensors"])
def test_no_steps_are_plain_rounding(narrow_r1: Path, text_file: Path, tmp_path: Path, to: str) -> None:
    output = _run(narrow_r1, text_file, tmp_path / "out", steps="none", to=to)
    assert "preset compact, no steps: " in (output / "README.md").read_text()
    original, found = open_checkpoint(narrow_r1).weights, open_checkpoint(output).weights
    grid, quantized = Grid(4, 64, to == "compressed-tensors"), _record(output)["outputs"][to]["weight_errors"]
    for name in original:
        rounded = name.removesuffix(".weight") in quantized
        wanted = round_to_nearest(original[name], grid).dequantize() if rounded else original[name]
        assert torch.allclose(found[name], wanted, rtol=0 if rounded else 2**-8, atol=0), name


@pytest.mark.parametrize("preset", [pytest.param(name, marks=pytest.mark.slow) for name in PRESET_STEPS])
def test_a_presets_steps_spelled_out_in_any_order_are_the_same_job(
    narrow_r1: Path, text_file: Path, tmp_path: Path, preset: str
) -> None:
    outputs = [
        _run(narrow_r1, text_file, tmp_path / name, preset=preset, steps=steps)
        for name, steps in (
            ("default", None),
            ("spelled", list(reversed(default_steps(preset, WIDEST_FOR_PREDICTIONS)))),
        )
    ]
    assert contents(outputs[0]) == contents(outputs[1])
    told = "best with predictions" if preset == "best" else preset
    assert f"preset {told}: " in (outputs[0] / "README.md").read_text()


@pytest.mark.parametrize(
    ("hidden_size", "steps", "found"),
    [
        (1024, {}, "best with predictions"),
        (1025, {}, "best"),
        (7168, {}, "best"),
        (1024, {"steps": "scales,clip,compensate,top-up,follow,descend"}, "best"),
        (1024, {"steps": "scales,follow"}, "best, steps scales and follow"),
    ],
)
def test_best_rounds_for_predictions_where_the_model_is_narrow_and_no_steps_are_named(
    tmp_path: Path, hidden_size: int, steps: dict[str, str], found: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2 | {"hidden_size": hidden_size}))
    options = {"model": str(tmp_path), "output": Path("out"), "preset": "best", "group_size": 64, "device": "cpu"}
    recipe = resolved(Recipe.checked(**options, **steps))
    assert preset_and_steps("best", recipe.steps) == found
    assert resolved(recipe) == recipe


def test_topping_up_changes_starved_experts_only(text_file: Path, tmp_path: Path) -> None:
    model, size = (
        add_tokenizer(make_pico_r1(tmp_path / "model", **NARROW | {"n_routed_experts": 8})),
        {"samples": 24, "seq_len": 64},
    )
    without, topped_up = (
        _run(model, text_file, tmp_path / steps, steps=steps, **size) for steps in ("clip", "clip,top-up")
    )
    starved = {(layer["layer"], int(one)) for layer in _record(topped_up)["layers"] for one in layer["topped_up"]}
    assert 0 < len(starved) < 8
    assert _experts_of(_changed(without, topped_up)) == starved
    assert not any(layer["topped_up"] for layer in _record(without)["layers"])


def test_gate_weights_change_routed_experts_only(narrow_r1: Path, text_file: Path, tmp_path: Path) -> None:
    alike, weighted = (
        _run(narrow_r1, text_file, tmp_path / steps, steps=steps) for steps in ("clip", "clip,gate-weights")
    )
    assert _experts_of(_changed(alike, weighted))


MLP = Mlp("routed expert", "gate", "up", "down", expert=0)


def _two_kinds_of_tokens() -> tuple[Activations, Routing, torch.Tensor]:
    """1000 tokens of which an expert has a share of 0.9, 1000 others with 0.1, and which are the first."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(2, 128, 128, generator=generator) / 128**0.5
    inputs_RH = (torch.randn(2, 1000, 128, generator=generator) @ mixing).flatten(0, 1)
    heavy_R = torch.arange(2000) < 1000
    routing = Routing(torch.zeros(2000, 1, dtype=torch.int16), torch.where(heavy_R, 0.9, 0.1).unsqueeze(1))
    return Activations(inputs_RH.unsqueeze(0)), routing, heavy_R


@pytest.mark.parametrize("steps", [("compensate",), ("clip", "compensate", "descend")], ids="-".join)
def test_gate_weights_shift_errors_to_tokens_with_a_small_share(steps: tuple[Step, ...]) -> None:
    inputs, routing, heavy_R = _two_kinds_of_tokens()
    weight_OI = torch.randn(64, 128, generator=torch.Generator().manual_seed(4))

    def errors(chosen: tuple[Step, ...]) -> tuple[float, float]:
        moments = inputs_of(inputs, MLP, routing, {}, chosen).moments(seed=0)
        change_OI = rounded_weight(weight_OI, Grid(4, 64, True), moments, chosen).difference(weight_OI)
        squares_R = (inputs.samples(0, 1)[0] @ change_OI.T).square().sum(1)
        return float(squares_R[heavy_R].sum()), float(squares_R[~heavy_R].sum())

    alike, weighted = errors(steps), errors((*steps, "gate-weights"))
    assert weighted[0] < 0.9 * alike[0] and weighted[1] > 1.1 * alike[1]


def test_added_tokens_weigh_as_the_least_of_an_experts_own() -> None:
    inputs, routing, _ = _two_kinds_of_tokens()
    routing = Routing(torch.tensor([[0], [0], [1]], dtype=torch.int16), torch.tensor([[0.5], [0.2], [0.7]]))
    added = {0: torch.tensor([2]), 5: torch.tensor([0, 1])}
    found = inputs_of(inputs, MLP, routing, added, ("gate-weights",))
    assert found.rows_R.tolist() == [0, 1, 2] and found.weights_R is not None
    assert torch.equal(found.weights_R, torch.tensor([0.5, 0.2, 0.2]))
    without_own = inputs_of(inputs, replace(MLP, expert=5), routing, added, ("gate-weights",))
    assert without_own.weights_R is not None and without_own.weights_R.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"steps": "descend", "to": "gguf:F16"}, "step descend: gguf:F16 rounds .* leave the step out"),
        ({"steps": "compensate,predictions"}, "step predictions: .* add the step follow"),
        ({"steps": "clip,fold"}, "steps: 'fold': give some of scales, clip, .*, or none alone"),
        ({"steps": "none,clip"}, "steps: 'none': give some of .*, or none alone"),
        ({"steps": ""}, "steps: '': give some of .*, or none alone"),
        ({"steps": 5}, "steps: 5 is not a list of steps: give some of"),
        ({"steps": iter(["clip"])}, "is not a list of steps"),
        ({"steps": ["none", "clip"]}, "steps: 'none': give some of"),
    ],
)
def test_steps_that_cannot_be_taken_are_refused(
    narrow_r1: Path, text_file: Path, tmp_path: Path, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        _run(narrow_r1, text_file, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("none", ["none", ["none"], [], ()])
def test_no_steps_can_be_said_in_several_ways(none: Any) -> None:
    assert Recipe.checked(output=Path("out"), steps=none).steps == ()


def test_a_dense_model_takes_all_steps_but_gate_weights(text_file: Path, tmp_path: Path) -> None:
    small = QWEN2 | {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    model = add_tokenizer(make_dense(tmp_path / "model", small), vocabulary=290)
    with pytest.raises(UsageError, match="gate-weights: this model has no routed experts; leave"):
        _run(model, text_file, tmp_path / "out", steps=STEPS)
    output = _run(model, text_file, tmp_path / "out", steps="clip,follow,descend", preset=None)
    assert _record(output)["recipe"]["preset"] == "compact"


@pytest.mark.slow
def test_descent_without_following_serves_several_formats(narrow_r1: Path, text_file: Path, tmp_path: Path) -> None:
    more = {"preset": "quality", "steps": "descend"}
    both = _run(narrow_r1, text_file, tmp_path / "both", to=["awq", "compressed-tensors"], **more)
    one = _run(narrow_r1, text_file, tmp_path / "one", **more)
    assert not _changed(both / "compressed-tensors", one)


@pytest.mark.slow
def test_widths_are_chosen_for_the_steps_of_the_job(narrow_r1: Path, text_file: Path, tmp_path: Path) -> None:
    errors = []
    for steps in ("none", "clip"):
        output = _run(narrow_r1, text_file, tmp_path / steps, steps=steps, target_bits=5.0)
        assert not dsquant.verify(output, progress=False).findings
        errors.append(sum(group["errors"]["4"] for group in _record(output)["precision"].values()))
    assert errors[1] < errors[0]
