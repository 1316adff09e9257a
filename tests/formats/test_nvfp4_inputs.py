"""NVFP4 whose engines round inputs too (W4A4): the stored scales of inputs, by an independent forward and readers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from checkpoints import QWEN3, add_tokenizer, full_model, make_dense, make_pico_r1
from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from kills import KILLED, run
from ranks import command, finish, start
from shapes import NARROW
from small_jobs import changed_copy, contents, noise

import dsquant
from dsquant.calibration.texts import calibration_tokens, load_tokenizer
from dsquant.errors import UsageError
from dsquant.evaluation.opening import open_candidate, open_original
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.formats.scales import open_scales
from dsquant.incremental.release import full_run
from dsquant.model.skeleton import Skeleton
from dsquant.quantization.statistics import InputStatistics
from dsquant.source.shards import read_index

pytestmark = pytest.mark.usefixtures("imported")
FORMATS = ("nvfp4", "nvfp4-modelopt")
ENDINGS = {"nvfp4": "input_global_scale", "nvfp4-modelopt": "input_scale"}
SAMPLES, SEQ_LEN = 2, 32
NEVER = "model.layers.1.mlp.experts.3"
"""An expert without tokens."""


def make(model: Path, text_file: Path, output: Path, **options: Any) -> Any:
    small = {"samples": SAMPLES, "seq_len": SEQ_LEN, "progress": False, "evaluate": False, "activations": "fp4"}
    return dsquant.awq(model, output=output, calibration=text_file, **small | options)


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer, a mixture of four experts, one of which gets no token, and a layer for multi-token prediction."""
    folder = tmp_path_factory.mktemp("w4a4")

    def shun(name: str, values: torch.Tensor) -> torch.Tensor | None:
        shunned = values.clone()
        shunned[-1] = -1e3
        return shunned if name == "model.layers.1.mlp.gate.e_score_correction_bias" else None

    changed_copy(make_pico_r1(folder / "all", outliers=True, **NARROW), folder / "pico", shun)
    return add_tokenizer(folder / "pico")


@pytest.fixture(scope="module")
def output(pico: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It in both layouts, every linear quantized; read only."""
    folder = tmp_path_factory.mktemp("w4a4") / "out"
    make(pico, text_file, folder, to=FORMATS, preset="compact", steps="scales", rest="bf16")
    return folder


def input_scales(folder: Path, name: str) -> dict[str, float]:
    index, ending = read_index(folder), f".{ENDINGS[name]}"
    shape = (1,) if name == "nvfp4" else ()
    found = {part.removesuffix(ending): info for part, info in index.items() if part.endswith(ending)}
    assert all((info.dtype, info.shape) == ("F32", shape) for info in found.values())
    return {linear: float(index.read(info.name)) for linear, info in found.items()}


class Watched:
    """transformers' whole model in float64, with what its linears read."""

    def __init__(self, folder: Path) -> None:
        self.weights = open_checkpoint(folder).weights
        self.model = full_model(folder, self.weights).double()
        self.model.set_experts_implementation("eager")
        self.inputs: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, torch.Tensor] = {}

        def watch(name: str) -> Callable[..., None]:
            def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                self.inputs[name] = inputs[0].flatten(0, -2)
                if name.endswith(".experts"):
                    self.tokens[name] = inputs[1]

            return hook

        for name, module in self.model.named_modules():
            module.register_forward_pre_hook(watch(name)) if name.endswith(("_proj", "_mqa", ".experts")) else None

    def expert(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What gate and up, and down, of an expert read."""
        experts, _, number = name.rpartition(".")
        rows_R = (self.tokens[experts] == int(number)).any(1)
        inputs_RH = self.inputs[experts][rows_R]
        gate, up = (self.weights[f"{name}.{part}_proj.weight"].double() for part in ("gate", "up"))
        return inputs_RH, torch.nn.functional.silu(inputs_RH @ gate.T) * (inputs_RH @ up.T)


def largest(inputs_RI: torch.Tensor, scales: Mapping[str, torch.Tensor], producer: str) -> float:
    scales_I = scales.get(producer, torch.ones(inputs_RI.shape[1])).double()
    return float((inputs_RI / scales_I).abs().max()) if len(inputs_RI) else 0.0


def wanted(model: Path, output: Path, text_file: Path) -> dict[str, float]:
    """Linear -> the largest magnitude that it reads under the scales, by a float64 forward of the original."""
    tokens_NT = calibration_tokens((str(text_file),), load_tokenizer(model), SAMPLES, SEQ_LEN, 0).tokens
    watched, found = Watched(model), dict[str, float]()
    with torch.no_grad():
        watched.model(tokens_NT, use_cache=False)
    stored = open_scales(output)
    scales = {name: stored.read(name) for name in stored}
    skeleton = Skeleton(open_checkpoint(model))
    for layer in skeleton.layers[: skeleton.num_layers]:
        for group in layer.attention:
            found |= {linear: largest(watched.inputs[linear], scales, group.producer) for linear in group.consumers}
        for mlp in layer.mlps:
            read = (watched.inputs.get(mlp.up), watched.inputs.get(mlp.down))
            of_input, of_down = watched.expert(mlp.up.rpartition(".")[0]) if mlp.expert is not None else read
            assert of_input is not None and of_down is not None
            found |= {linear: largest(of_input, scales, layer.norm) for linear in (mlp.gate, mlp.up)}
            found[mlp.down] = largest(of_down, scales, mlp.up)
        for place in range(3):
            of_layer = max((found[mlp.linears[place]] for mlp in layer.experts), default=0.0)
            found |= {mlp.linears[place]: of_layer for mlp in layer.experts}
    return found


def test_scales_are_those_of_an_independent_forward_on_the_calibration_tokens(
    pico: Path, output: Path, text_file: Path
) -> None:
    expected = wanted(pico, output / "nvfp4", text_file)
    divisors, factors = (input_scales(output / name, name) for name in FORMATS)
    index = read_index(output / "nvfp4")
    assert (
        divisors.keys()
        == factors.keys()
        == {name.removesuffix(".weight_packed") for name in index if name.endswith(".weight_packed")}
    )
    for linear, divisor in divisors.items():
        assert divisor == pytest.approx(448 * 6 / expected[linear], rel=1e-4), linear
        assert factors[linear] == pytest.approx(expected[linear] / (448 * 6), rel=1e-4), linear
    assert divisors[f"{NEVER}.down_proj"] == divisors[f"{NEVER.replace('.3', '.0')}.down_proj"]
    assert len({divisors[f"model.layers.1.mlp.{one}.up_proj"] for one in ("shared_experts", "experts.0")}) == 1
    assert len(set(divisors.values())) > 8


def test_configs_are_those_of_compressed_tensors_and_modelopt_and_verify_and_eval_know_them(
    pico: Path, output: Path
) -> None:
    configs = [json.loads((output / name / "config.json").read_text())["quantization_config"] for name in FORMATS]
    (group,) = QuantizationConfig.model_validate(configs[0]).config_groups.values()
    theirs = preset_name_to_scheme("NVFP4", ["Linear"])
    keys = ("num_bits", "type", "strategy", "symmetric", "dynamic", "group_size", "scale_dtype", "zp_dtype")
    for part in ("weights", "input_activations"):
        ours, wanted = getattr(group, part), getattr(theirs, part)
        assert [getattr(ours, key) for key in keys] == [getattr(wanted, key) for key in keys]
    assert group.input_activations.observer == theirs.input_activations.observer
    assert configs[1]["quant_algo"] == "NVFP4" and configs[1]["config_groups"]["group_0"]["input_activations"] == {
        "dynamic": False, "num_bits": 4, "type": "float", "group_size": 16,
    }  # fmt: skip
    assert dsquant.verify(output, everything=True, progress=False).ok
    for name in FORMATS:
        assert set(open_checkpoint(output / name).weights) == set(open_checkpoint(pico).weights)
        assert "activations in FP4" in (output / name / "README.md").read_text()
    original, opened = open_original(str(pico)), (*(output / name for name in FORMATS), pico)
    assert [open_candidate(str(one), original).engines_round for one in opened] == [True, True, False]


@pytest.mark.slow
def test_eval_says_that_it_rounds_no_activations(pico: Path, output: Path, text_file: Path) -> None:
    candidate = output / "nvfp4-modelopt"
    found = dsquant.evaluate(pico, candidate, texts=text_file, samples=1, seq_len=16, progress=False)
    (words,) = (caveat for caveat in found.caveats if "engines round activations" in caveat)
    assert str(candidate) in words and str(pico) not in words


def test_compressed_tensors_makes_one_layout_of_the_other(output: Path) -> None:
    indexes = [read_index(output / name) for name in FORMATS]
    ours, theirs = ({name: index.read(name) for name in index} for index in indexes)
    made = ModelOptNvfp4Converter(targets=[r"re:.*(_proj|_mqa)$"]).validate(theirs)
    assert made.keys() == ours.keys()
    for name, tensor in ours.items():
        if name.endswith(ENDINGS["nvfp4"]):
            assert torch.allclose(made[name], tensor, rtol=1e-6), name
        else:
            assert torch.equal(made[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def test_weights_are_those_of_a_job_that_rounds_no_inputs(
    pico: Path, output: Path, text_file: Path, tmp_path: Path
) -> None:
    make(pico, text_file, tmp_path / "out", to="nvfp4", preset="compact", steps="scales", rest="bf16", activations=None)
    plain, ours = read_index(tmp_path / "out"), read_index(output / "nvfp4")
    assert {name for name in ours if not name.endswith(ENDINGS["nvfp4"])} == set(plain)
    assert all(torch.equal(plain.read(name).view(torch.uint8), ours.read(name).view(torch.uint8)) for name in plain)


def test_transformers_finds_every_linears_scale_of_its_inputs(text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dense = add_tokenizer(make_dense(tmp_path / "qwen3", QWEN3 | {"num_hidden_layers": 1}))
    make(dense, text_file, tmp_path / "out", to="nvfp4", steps="scales")
    scales = input_scales(tmp_path / "out", "nvfp4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    modules = dict(model.named_modules())
    assert len(scales) == 7 and {name: float(modules[name].input_global_scale.detach()) for name in scales} == scales
    fused = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
    assert all(len({scales[f"model.layers.0.{one}"] for one in parts}) == 1 for parts in fused)


def test_a_delta_keeps_the_recorded_scales_of_inputs(pico: Path, text_file: Path, tmp_path: Path) -> None:
    make(pico, text_file, tmp_path / "out", to="nvfp4", preset="quality", steps="none")
    changed_copy(pico, tmp_path / "new", noise(0.1, seed=3))
    made = dsquant.delta(tmp_path / "out", tmp_path / "new", output=tmp_path / "delta", progress=False)
    assert any(".experts." in name for name in made.changed)
    scales = input_scales(tmp_path / "out", "nvfp4")
    assert len(scales) == 12 and input_scales(tmp_path / "delta", "nvfp4") == scales
    full_run(str(tmp_path / "new"), tmp_path / "out", tmp_path / "full")
    assert contents(tmp_path / "delta") == contents(tmp_path / "full")
    assert dsquant.verify(tmp_path / "delta", everything=True, progress=False).ok


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "nvfp4", "calibration": "none"}, "--calibration none: nvfp4 is calibrated, as --activations fp4 wants"),
        ({"to": "mxfp4"}, "mxfp4 has no inputs of that kind; take --to nvfp4 or nvfp4-modelopt"),
    ],
)
def test_what_has_no_scales_of_inputs_is_refused(
    pico: Path, text_file: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    fields = {"activations": "fp4", "calibration": text_file, "progress": False, **options}
    with pytest.raises(UsageError, match=message):
        dsquant.awq(pico, output=tmp_path / "out", **fields)


def test_the_largest_magnitudes_are_merged_divided_and_carried_and_weights_do_not_count() -> None:
    parts = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0))
    total, arrived = (InputStatistics(64, seed=0) for _ in range(2))
    for part_RI in parts:
        one = InputStatistics(64, seed=1)
        one.add(part_RI, torch.full((40,), 0.25))
        one.add(part_RI[:0])
        total.merge(one)
    carried: list[torch.Tensor] = []
    total.travel(total.count, lambda tensor: carried.append(tensor.clone()))
    arrived.travel(total.count, lambda tensor: tensor.copy_(carried.pop(0)))  # type: ignore[arg-type, return-value]
    expected_I = parts.abs().amax((0, 1))
    assert torch.equal(arrived.moments().largest_I, expected_I)
    scales_I = torch.rand(64) + 0.5
    of_scaled = arrived.moments().divided(scales_I).importance.largest
    assert of_scaled is not None and of_scaled == (expected_I / scales_I).max()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["compact", "best"])
def test_two_ranks_write_the_bytes_of_one(narrow_r1: Path, text_file: Path, tmp_path: Path, preset: str) -> None:
    formats = ("--to", "nvfp4", "--to", "nvfp4-modelopt", "--activations", "fp4", "--rest", "bf16")
    more = (*formats, "--preset", preset, "--mtp", "quantize", "--samples", "3")
    forked.finish(*command(narrow_r1, text_file, tmp_path / "one", *more))
    finish(start(2, narrow_r1, text_file, tmp_path / "two", *more))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_a_killed_job_continues_with_the_same_bytes(pico: Path, text_file: Path, tmp_path: Path) -> None:
    def job(folder: Path, resume: bool = False) -> None:
        options = {"to": FORMATS, "rest": "bf16", "preset": "compact", "steps": "clip"}
        make(pico, text_file, folder / "out", resume=resume, **options)

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    code, calls = run(lambda: job(tmp_path / "whole"), tmp_path / "whole", None)
    assert code == 0
    code, _ = run(lambda: job(tmp_path / "killed"), tmp_path / "killed", 2 * calls // 3)
    assert code == KILLED
    assert run(lambda: job(tmp_path / "killed", resume=True), tmp_path / "killed", None)[0] == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
