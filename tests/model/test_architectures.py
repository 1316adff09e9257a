"""Each family: its forward is transformers', folding changes nothing, every format is made and read back."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, NOT_IN_LLAMA_CPP, OF_27_LAYERS, Architecture
from checkpoints import FP8, add_tokenizer
from gguf_files import PLAIN, with_keys
from llama_cpp import every_position
from random_models import make_random, random_module, shapes_of, whole_logits
from small_jobs import FAST
from streams import randomly_folded, stream_logits

import dsquant
from dsquant.deployment.planned import planned_checkpoint
from dsquant.errors import InputError, UsageError
from dsquant.evaluation.opening import open_candidate, open_original
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.families import FAMILIES, family_of
from dsquant.model.skeleton import Skeleton
from dsquant.source.shards import read_index

TOKENS_NT = torch.randint(6, 280, (2, 48), generator=torch.Generator().manual_seed(3))
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
VARIANTS = {
    f"{name}: {variant}": (one, changes)
    for name, one in ARCHITECTURES.items()
    for variant, changes in {"plain": {}, **one.variants}.items()
}
EVERY_VARIANT = pytest.mark.parametrize(("architecture", "changes"), VARIANTS.values(), ids=VARIANTS)
EVERY_LOADABLE = pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * ("num_hidden_layers" in case[1]))
        for name, case in VARIANTS.items()
        if name not in NOT_IN_LLAMA_CPP
    ],
)
# Activations rounded to 8 bits beside GGUF's types lead some tokens of a random network to other experts.
WITHIN = {"compressed-tensors": 0.15, "gguf:Q8_0": 0.03, "awq": 0.15}


def divergences(logits_NTV: torch.Tensor, candidate_NTV: torch.Tensor) -> torch.Tensor:
    """KL divergences of log-probabilities from those of logits, [N, T]."""
    original_NTV = logits_NTV.double().log_softmax(-1)
    return (original_NTV.exp() * (original_NTV - candidate_NTV)).sum(-1)


@EVERY_VARIANT
def test_the_streamed_forward_is_transformers_and_folding_leaves_it(
    architecture: Architecture, changes: dict[str, object], tmp_path: Path
) -> None:
    folder = make_random(tmp_path / "model", architecture.config, **changes)
    checkpoint = open_checkpoint(folder)
    skeleton, weights = Skeleton(checkpoint), checkpoint.weights
    wanted, keys = whole_logits(folder, TOKENS_NT), noted_choices(skeleton)
    found, experts = stream_logits(folder, weights, TOKENS_NT, 1, skeleton)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    folded, same_experts = stream_logits(folder, randomly_folded(weights, skeleton), TOKENS_NT, 1, skeleton)
    assert float((folded - found).norm() / found.norm()) < 1e-6
    assert all(torch.equal(one, other) for one, other in zip(experts, same_experts, strict=True))
    middle = len(keys) // 2
    assert all(torch.equal(one, other) for one, other in zip(keys[:middle], keys[middle:], strict=True))
    assert any(one.numel() for one in keys) == ("index_topk" in changes)


def noted_choices(skeleton: Skeleton) -> list[torch.Tensor]:
    """What indexers choose from now on."""
    found: list[torch.Tensor] = []
    for name, module in skeleton.model.named_modules():
        if name.endswith(".indexer"):
            module.register_forward_hook(lambda _, __, chosen: found.append(chosen))
    return found


@EVERY
def test_its_network_has_exactly_the_tensors_of_a_release(architecture: Architecture, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_random(tmp_path / "model", architecture.config))
    assert Skeleton(checkpoint).expected_shapes() == shapes_of(checkpoint.config)


@EVERY
def test_what_transformers_saves_is_read_too(architecture: Architecture, tmp_path: Path) -> None:
    model = random_module(architecture.config)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(TOKENS_NT).logits
    found, _ = stream_logits(tmp_path, open_checkpoint(tmp_path).weights, TOKENS_NT, 1)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def check_ignored(folder: Path) -> None:
    """Every matrix that is not quantized is named to engines, indexers among them."""
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    patterns = [one.removeprefix("re:") if one.startswith("re:") else re.escape(one) for one in ignored]
    stored = {info.name: info for info in read_index(folder).values()}
    kept = {name.removesuffix(".weight") for name, info in stored.items() if len(info.shape) == 2}
    kept -= {name.removesuffix(suffix) for name in stored for suffix in (".weight_scale", ".weight_packed")}
    kept -= {name for name in kept if name.endswith((".weight_scale", ".weight_packed"))} | {"model.embed_tokens"}
    assert not [name for name in kept if not any(re.fullmatch(pattern, name) for pattern in patterns)]


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(one, marks=[pytest.mark.slow] * (name not in ("DeepSeek-V3.2", "Qwen3 MoE")))
        for name, one in ARCHITECTURES.items()
    ],
    ids=ARCHITECTURES,
)
@pytest.mark.parametrize(
    ("steps", "formats"),
    [("none", ["compressed-tensors", "gguf:Q8_0"]), pytest.param("scales", list(WITHIN), marks=pytest.mark.slow)],
    ids=["rounded", "scaled"],
)
def test_every_format_is_made_verified_and_read_back(
    architecture: Architecture, steps: str, formats: list[str], tmp_path: Path, text_file: Path
) -> None:
    model = add_tokenizer(make_random(tmp_path / "model", architecture.config), vocabulary=280)
    options = FAST | {"steps": steps, "group_size": 32, "calibration": [str(text_file)]}
    result = dsquant.awq(model, to=formats, output=tmp_path / "out", mtp="quantize", preset="compact", **options)
    assert dsquant.verify(tmp_path / "out", source=model, progress=False).ok
    check_ignored(result.folders["compressed-tensors"])
    measured = {"texts": [text_file], "seq_len": 32, "samples": 2, "prompts": "none", "progress": False}
    candidates = dsquant.evaluate(model, *result.folders.values(), **measured).candidates
    for name, candidate in zip(formats, candidates, strict=True):
        assert 0 < candidate.texts["text.txt"].mean_kl.estimate < WITHIN[name], name
        assert not any("router" in finding for finding in candidate.findings)


@EVERY_LOADABLE
def test_llama_cpp_computes_what_transformers_does(
    architecture: Architecture, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = add_tokenizer(make_random(tmp_path / "model", architecture.config, **changes), vocabulary=280)
    (file,) = dsquant.gguf(model, type="F32", output=tmp_path / "out", mtp="keep", **PLAIN).folders.values()
    wanted = whole_logits(model, TOKENS_NT)
    # By default llama.cpp keeps keys, the indexer's too, in F16: tokens at a tie go to other experts, or see others.
    assert float(divergences(wanted, every_position(file, TOKENS_NT, in_f32=True)).max()) < 1e-5
    assert float((divergences(wanted, every_position(file, TOKENS_NT)) < 1e-5).double().mean()) > 0.97
    open_candidate(str(model), open_original(str(file)))  # a file alone, from its keys, is the same network


@pytest.mark.parametrize("name", NOT_IN_LLAMA_CPP)
def test_what_llama_cpp_computes_otherwise_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (architecture, changes), (message, keys) = VARIANTS[name], NOT_IN_LLAMA_CPP[name]
    model = add_tokenizer(make_random(tmp_path / "model", architecture.config, **changes), vocabulary=280)
    with pytest.raises(InputError, match=message):
        dsquant.gguf(model, type="F32", output=tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()
    family = family_of(model, architecture.config)
    loose = replace(family, gguf=replace(family.gguf, problems=lambda config: ()))
    monkeypatch.setitem(FAMILIES, family.architecture, loose)
    (file,) = dsquant.gguf(model, type="F32", output=tmp_path / "out", **PLAIN).folders.values()
    wanted = whole_logits(model, TOKENS_NT)
    for seen in (file, with_keys(file, tmp_path / "stated.gguf", keys)):
        assert float(divergences(wanted, every_position(seen, TOKENS_NT, in_f32=True)).max()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("config", OF_27_LAYERS.values(), ids=OF_27_LAYERS)
def test_models_of_27_layers_with_their_real_heads(config: dict[str, Any], tmp_path: Path, text_file: Path) -> None:
    model = add_tokenizer(make_random(tmp_path / "model", config), vocabulary=280)
    wanted = whole_logits(model, TOKENS_NT)
    found, _ = stream_logits(model, open_checkpoint(model).weights, TOKENS_NT, 1)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    formats = ["awq", "compressed-tensors", "gguf:F32"]
    options = FAST | {"group_size": 32, "calibration": [str(text_file)]}
    folders = dsquant.awq(model, to=formats, output=tmp_path / "out", preset="compact", **options).folders
    assert dsquant.verify(tmp_path / "out", source=model, progress=False).ok
    measured = {"texts": [text_file], "seq_len": 32, "samples": 2, "prompts": "none", "progress": False}
    candidates = dsquant.evaluate(model, *folders.values(), **measured).candidates
    drifts = [one.texts["text.txt"].mean_kl.estimate for one in candidates]
    assert drifts[2] < 1e-6 and all(0 < drift < 1 for drift in drifts[:2]), drifts  # 27 random layers in 4 bits
    assert float(divergences(wanted, every_position(folders["gguf:F32"], TOKENS_NT, in_f32=True)).max()) < 1e-5


def test_layers_that_share_a_choice_of_keys_take_no_longer_samples(tmp_path: Path) -> None:
    config = ARCHITECTURES["GLM-5"].config
    skeleton = Skeleton(open_checkpoint(make_random(tmp_path / "model", config, index_topk=32)))
    skeleton.check_length(32)
    with pytest.raises(UsageError, match=r"samples of 33 tokens.* up to 32 tokens.*lower --seq-len"):
        skeleton.check_length(33)


def test_a_plan_knows_what_releases_store_of_an_indexer(tmp_path: Path) -> None:
    config = ARCHITECTURES["DeepSeek-V3.2"].config | {"quantization_config": FP8}
    index = planned_checkpoint(tmp_path, config)[0].index
    prefix = "model.layers.0.self_attn.indexer"
    assert [index[f"{prefix}.{name}.weight"].dtype for name in ("wq_b", "wk", "weights_proj")] == [
        "F8_E4M3", "F8_E4M3", "BF16",
    ]  # fmt: skip


REFUSED = [(one, changes, message) for one in ARCHITECTURES.values() for changes, message in one.refused]


@pytest.mark.parametrize(("architecture", "changes", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_no_release_has_is_refused_by_name(
    architecture: Architecture, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        family_of(Path("model"), architecture.config | changes)


@EVERY
def test_what_attention_adds_to_hidden_states_comes_from_o_proj(architecture: Architecture, tmp_path: Path) -> None:
    skeleton = Skeleton(open_checkpoint(make_random(tmp_path / "model", architecture.config)))
    assert all(layer.attention_output == f"{layer.attention_module}.o_proj" for layer in skeleton.layers)
