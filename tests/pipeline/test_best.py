"""Preset `best`: the hidden states it follows are those of its output, which drifts less than `compact`'s."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import QWEN2, add_tokenizer, full_model, make_dense
from small_jobs import FAST, contents
from streams import stream_logits

import dsquant
from dsquant.calibration.texts import held_out_tokens, load_tokenizer
from dsquant.errors import InputError, Interrupted
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.activations import Activations
from dsquant.model.overlays import ReplacedWeights
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import embed, final_norm, head_name
from dsquant.pipeline import units as conversion
from dsquant.presets import PRESET_STEPS
from dsquant.quantization import mlp, sequential
from dsquant.quantization.layer_job import LayerJob, QuantizedStream
from dsquant.quantization.sequential import quantize_sequentially
from dsquant.schemes import UNQUANTIZED, Grid, QuantizedWeight

GRID = Grid(4, 64, True)
SMALL_QWEN2 = QWEN2 | {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}


def _followed(
    folder: Path, tokens_NT: torch.Tensor, grid: Grid = GRID, kept: str = "none", **more: Any
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """What was emitted, dequantized, of all linears but those with `kept` in their names; and the logits of both
    streams [N, T, V]. o_proj and expert 2 have 8 bits."""
    checkpoint = open_checkpoint(folder)
    skeleton, weights = Skeleton(checkpoint), checkpoint.weights
    shape = (*tokens_NT.shape, skeleton.config["hidden_size"])
    streams = [[Activations(torch.zeros(shape)) for _ in range(3)] for _ in range(2)]
    for inputs, _, _ in streams:
        embed(skeleton, weights, tokens_NT, inputs)
    changed: dict[str, torch.Tensor] = {}

    def emit(_: Grid, name: str, value: QuantizedWeight | torch.Tensor) -> None:
        quantized = isinstance(value, QuantizedWeight)
        changed[f"{name}.weight" if quantized else name] = value.dequantize() if quantized else value

    for layer in skeleton.layers[: skeleton.num_layers]:
        original, quantized = streams
        linears = frozenset(linear for linear in layer.linears if kept not in linear)
        wider = {linear: grid.with_bits(8) for linear in linears if "o_proj" in linear or ".experts.2." in linear}
        quantize_sequentially(
            LayerJob(
                skeleton, layer, weights, *original, {grid: linears}, 2, 0, emit, lambda name: None,
                schemes={grid: wider}, quantized={grid: QuantizedStream(*quantized)}, **more,
            )
        )  # fmt: skip
        streams = [[outputs, inputs, mlp_inputs] for inputs, outputs, mlp_inputs in streams]
    hidden = [final_norm(skeleton, weights, inputs.samples(0, len(tokens_NT))) for inputs, _, _ in streams]
    wanted, found = (part @ weights[head_name(skeleton)].T for part in hidden)
    return changed, wanted, found


@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["R1", "Qwen2"])
def test_the_hidden_states_it_follows_are_those_of_its_output(narrow_r1: Path, tmp_path: Path, dense: bool) -> None:
    folder = make_dense(tmp_path / "model", SMALL_QWEN2) if dense else narrow_r1
    tokens_NT = torch.randint(0, 290, (4, 30), generator=torch.Generator().manual_seed(1))
    changed, original_NTV, quantized_NTV = _followed(folder, tokens_NT)
    weights = open_checkpoint(folder).weights
    for found_NTV, base in ((original_NTV, weights), (quantized_NTV, ReplacedWeights(weights, changed))):
        wanted_NTV, _ = stream_logits(folder, base, tokens_NT)
        assert float((found_NTV - wanted_NTV).norm() / wanted_NTV.norm()) < 1e-3


@pytest.mark.parametrize(
    ("kept", "grid"),
    [
        ("self_attn", GRID),
        pytest.param(".experts.1.", GRID, marks=pytest.mark.slow),
        pytest.param("none", replace(GRID, rounded=False), marks=pytest.mark.slow),
    ],
)
def test_it_follows_a_model_that_is_quantized_in_parts(narrow_r1: Path, kept: str, grid: Grid) -> None:
    tokens_NT = torch.randint(0, 290, (3, 20), generator=torch.Generator().manual_seed(1))
    changed, _, found_NTV = _followed(narrow_r1, tokens_NT, grid, kept, steps=["scales"])
    weights = open_checkpoint(narrow_r1).weights
    wanted_NTV, _ = stream_logits(narrow_r1, ReplacedWeights(weights, changed), tokens_NT)
    assert float((found_NTV - wanted_NTV).norm() / wanted_NTV.norm()) < 1e-3
    original_NTV, _ = stream_logits(narrow_r1, weights, tokens_NT)
    assert (float((found_NTV - original_NTV).norm() / original_NTV.norm()) < 1e-3) != grid.rounded


@pytest.mark.parametrize(("blind", "share"), [("attention", 0.99), ("mlp", 0.95)])
def test_attention_and_dense_mlps_make_up_for_what_hidden_states_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blind: str, share: float
) -> None:
    folder = make_dense(tmp_path / "model", SMALL_QWEN2 | {"num_hidden_layers": 4})
    tokens_NT = torch.randint(0, 290, (16, 64), generator=torch.Generator().manual_seed(1))

    def error() -> float:
        _, wanted_NTV, found_NTV = _followed(folder, tokens_NT, Grid(2, 64, True))
        return float((found_NTV - wanted_NTV).norm() / wanted_NTV.norm())

    aimed = error()
    nothing = torch.zeros(tokens_NT.numel(), SMALL_QWEN2["hidden_size"])
    if blind == "attention":
        monkeypatch.setattr(sequential._Streams, "lack", lambda self, batch: nothing[: (batch[1] - batch[0]) * 64])
    else:
        monkeypatch.setattr(mlp.LoadedMlp, "lack", lambda self, rows_R, hidden_RW: None)
    assert aimed < share * error()


def _mean_kl(folder: Path, original_NTV: torch.Tensor, tokens_NT: torch.Tensor, model: Path) -> float:
    with torch.no_grad():
        found_NTV = full_model(model, open_checkpoint(folder).weights)(tokens_NT).logits
    log_p, log_q = original_NTV.double().log_softmax(-1), found_NTV.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_it_drifts_less_than_compact(tiny_r1: Path, tmp_path: Path, device: str) -> None:
    tokens_NT = held_out_tokens("code", load_tokenizer(tiny_r1), 256, 24)
    with torch.no_grad():
        original_NTV = full_model(tiny_r1, open_checkpoint(tiny_r1).weights)(tokens_NT).logits
    found = {}
    for preset in ("compact", "best"):
        output = tmp_path / preset
        dsquant.awq(
            tiny_r1, output=output, to="compressed-tensors", preset=preset, calibration="code", samples=32,
            seq_len=256, device=device, evaluate=False, progress=False,
        )  # fmt: skip
        found[preset] = _mean_kl(output, original_NTV, tokens_NT, tiny_r1)
    assert found["best"] < 0.95 * found["compact"]


def _options(output: Path, text: Path, **more: Any) -> dict[str, Any]:
    return {
        "output": output,
        "preset": "best",
        "calibration": (str(text),),
        **FAST,
        "steps": None,
        "symmetric": True,
        **more,
    }


@pytest.mark.slow
@pytest.mark.parametrize("steps", [",".join(PRESET_STEPS["best"]), "scales,compensate,follow,predictions"])
def test_interrupted_in_every_layer_and_resumed_it_writes_the_same_bytes(
    pico_r1: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: str
) -> None:
    formats = ["compressed-tensors"] if "predictions" in steps else ["awq", "compressed-tensors"]
    more = {"to": formats, "mtp": "quantize", "steps": steps}
    dsquant.awq(pico_r1, **_options(tmp_path / "whole", text_file, **more))
    calls = 0

    def stop_at_times(job: LayerJob) -> Any:
        nonlocal calls
        calls += 1
        report = quantize_sequentially(job)
        if calls % 2:  # the layer is computed, and lost
            raise Interrupted("here")
        return report

    monkeypatch.setattr(conversion, "quantize_sequentially", stop_at_times)
    options = _options(tmp_path / "resumed", text_file, resume=True, **more)
    for _ in range(6):
        with pytest.raises(Interrupted):
            dsquant.awq(pico_r1, **options)
    dsquant.awq(pico_r1, **options)
    assert calls == 12 and contents(tmp_path / "whole") == contents(tmp_path / "resumed")


def test_hidden_states_of_the_quantized_model_that_are_damaged_are_refused(
    narrow_r1: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(job: LayerJob) -> None:
        raise Interrupted("here")

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(conversion, "quantize_sequentially", stop)
        dsquant.awq(narrow_r1, **_options(tmp_path / "out", text_file))
    path = tmp_path / "out" / ".dsquant-work" / "hidden-0-quantized.f32"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"hidden-0-quantized\.f32 of the interrupted job is damaged"):
        dsquant.awq(narrow_r1, **_options(tmp_path / "out", text_file, resume=True))


def test_a_dense_model_keeps_the_preset(text_file: Path, tmp_path: Path) -> None:
    model = add_tokenizer(make_dense(tmp_path / "model", SMALL_QWEN2), vocabulary=290)
    dsquant.awq(model, **_options(tmp_path / "out", text_file))
    index = open_checkpoint(tmp_path / "out").index
    assert sum(name.endswith(".qweight") for name in index) == 2 * 7


def _safetensors(output: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(output).items() if name.endswith(".safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"steps": "scales,follow", "samples": 2, "mtp": "drop"}, {}])
def test_each_grid_of_several_formats_follows_its_own_model(
    narrow_r1: Path, text_file: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    def run(name: str, to: list[str]) -> Path:
        dsquant.awq(narrow_r1, **_options(tmp_path / name, text_file, to=to, symmetric=None, **more))
        return tmp_path / name

    both = run("both", ["awq", "compressed-tensors"])
    alone = run("alone", ["compressed-tensors"])
    assert _safetensors(both / "compressed-tensors") == _safetensors(alone)


def test_a_target_gives_linears_widths_of_their_own(narrow_r1: Path, text_file: Path, tmp_path: Path) -> None:
    more = {"to": "compressed-tensors", "rest": "bf16", "samples": 2, "target_bits": 9.0, "steps": "clip,follow"}
    dsquant.awq(narrow_r1, **_options(tmp_path / "out", text_file, **more))
    record = json.loads((tmp_path / "out" / "dsquant.json").read_text())
    widths = {group["width"] for group in record["precision"].values()}
    assert UNQUANTIZED in widths and len(widths) > 1
    assert not dsquant.verify(tmp_path / "out", progress=False).findings
