"""Kimi-K2-Thinking's 4 bits as a source: read as floats, and kept code by code in GGUF's Q4_0."""

import json
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
import torch
from architectures import LATENT
from checkpoints import add_tokenizer, random_weights, save_checkpoint, stored
from gguf_files import PLAIN, decoded, tensors_of
from random_models import shapes_of
from safetensors.torch import load_file, save_file
from small_jobs import FAST

import dsquant
from dsquant.calibration.texts import load_tokenizer
from dsquant.errors import InputError
from dsquant.formats.checkpoints import open_checkpoint

GROUP = 32
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False}
QUANTIZATION = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
}  # fmt: skip
KIMI = LATENT | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "num_nextn_predict_layers": 0, "quantization_config": QUANTIZATION,
}  # fmt: skip


def packed(weight_OI: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a weight, as compressed-tensors packs it with 15 of 16 codes, and its values."""
    groups_OGS = weight_OI.unflatten(1, (-1, GROUP))
    scales_OG = (groups_OGS.abs().amax(2) / 7).to(torch.bfloat16)
    codes_OI = (groups_OGS / scales_OG.float().unsqueeze(2)).round().clamp(-7, 7).flatten(1).to(torch.int64)
    shifts = 4 * torch.arange(8)
    words = ((codes_OI + 8).unflatten(1, (-1, 8)) << shifts).sum(2)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    values_OI = (codes_OI.unflatten(1, (-1, GROUP)) * scales_OG.float().unsqueeze(2)).flatten(1)
    parts = {"_packed": words, "_scale": scales_OG, "_shape": torch.tensor(weight_OI.shape)}
    return parts, values_OI


def make(folder: Path, prefix: str = "", **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model with experts in 4 bits, and their values."""
    config, values = KIMI | changes, {}
    tensors = stored(random_weights(shapes_of(KIMI)), fp8=False)
    for name in [name for name in tensors if ".mlp.experts." in name]:
        parts, values[name] = packed(tensors.pop(name).float())
        tensors |= {name + suffix: part for suffix, part in parts.items()}
    if prefix:
        config = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": config}
    renamed = {prefix + name: tensor for name, tensor in tensors.items()}
    return add_tokenizer(save_checkpoint(folder, config, renamed), vocabulary=280), values


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    return make(tmp_path_factory.mktemp("kimi") / "model")


@pytest.mark.parametrize("prefix", ["", "language_model."], ids=["K2-Thinking", "K2.5"])
def test_experts_are_read_as_floats(tmp_path: Path, prefix: str) -> None:
    model, values = make(tmp_path / "model", prefix)
    weights = open_checkpoint(model).weights
    assert all(torch.equal(weights[name], wanted) for name, wanted in values.items())
    assert dsquant.inspect(model).parameters == sum(np.prod(shape) for shape in shapes_of(KIMI).values())


def test_scales_that_q4_0_cannot_hold_are_refused(tmp_path: Path) -> None:
    model, _ = make(tmp_path / "model")
    for shard in model.glob("*.safetensors"):
        tensors = load_file(shard)
        huge = {name: tensor * 0 + 1e6 for name, tensor in tensors.items() if "experts.1.up_proj.weight_scale" in name}
        save_file(tensors | huge, shard)
    with pytest.raises(InputError, match=r"experts\.1\.up_proj\.weight' has a value of 9.99e\+05; .*Q4_0"):
        dsquant.gguf(model, type="Q8_0", tensor_types=["_exps=Q4_0"], output=tmp_path / "out", **PLAIN)


def test_q4_0_has_the_very_codes_and_scales(kimi: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    model, values = kimi
    output = tmp_path / "out"
    dsquant.gguf(model, type="Q8_0", tensor_types=["_exps=Q4_0"], output=output, **PLAIN)
    tensors = tensors_of(output)
    for kind in ("gate", "up", "down"):
        tensor = tensors[f"blk.1.ffn_{kind}_exps.weight"]
        assert tensor.tensor_type == gguf_py.GGMLQuantizationType.Q4_0
        experts = [values[f"model.layers.1.mlp.experts.{number}.{kind}_proj.weight"] for number in range(4)]
        assert torch.equal(decoded(tensor), torch.stack(experts))
    assert dsquant.verify(output, source=model, progress=False).ok


def test_other_types_and_formats_are_made_of_it(
    kimi: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, text_file: Path
) -> None:
    output, formats = tmp_path / "out", ["compressed-tensors", "gguf:Q8_0"]
    dsquant.awq(kimi[0], to=formats, calibration=[str(text_file)], output=output, **FAST | {"group_size": 32})
    assert dsquant.verify(output, source=kimi[0], progress=False).ok


def test_what_was_quantized_elsewhere_is_still_refused(tmp_path: Path, text_file: Path) -> None:
    model, _ = make(tmp_path / "model", model_type="deepseek_v3")
    with pytest.raises(InputError, match=r"already quantized \(compressed-tensors\)"):
        dsquant.awq(model, to="awq", calibration=[str(text_file)], output=tmp_path / "out", **FAST)


def test_a_tokenizer_that_is_code_is_read_from_the_file_beside_it(tmp_path: Path) -> None:
    model, _ = make(tmp_path / "model")
    path = model / "tokenizer_config.json"
    code = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization.TikTokenTokenizer", None]},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    (model / "tiktoken.model").write_text("")
    assert load_tokenizer(model).encode("def f(x):")
    (model / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tiktoken\.model is read by code .* put a tokenizer\.json"):
        load_tokenizer(model)
