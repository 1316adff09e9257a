"""Folding AWQ's scales, with nothing rounded, leaves the function as it is: logits and routed experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import QWEN2, make_dense, make_pico_r1
from shapes import NARROW
from streams import stream_logits

from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.activations import Activations
from dsquant.model.overlays import ReplacedWeights
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import embed
from dsquant.quantization.layer import quantize_layer
from dsquant.quantization.layer_job import LayerJob
from dsquant.schemes import Grid


def folded_weights(folder: Path, tokens: torch.Tensor, group_size: int, stored: bool) -> dict[str, torch.Tensor]:
    """Every parameter that folding changes; rounded to bfloat16 outside the quantized linears where `stored`."""
    checkpoint = open_checkpoint(folder)
    skeleton = Skeleton(checkpoint)
    shape = (*tokens.shape, skeleton.config["hidden_size"])
    inputs, outputs, mlp_inputs = (Activations(torch.zeros(shape)) for _ in range(3))
    embed(skeleton, checkpoint.weights, tokens, inputs)
    changed: dict[str, torch.Tensor] = {}

    def emit(_: Grid, name: str, value: Any) -> None:
        kept = stored and name.removesuffix(".weight") not in linears
        changed[name] = value.to(torch.bfloat16).float() if kept else value

    for layer in skeleton.layers[: skeleton.num_layers]:
        linears = frozenset(layer.linears)
        job = LayerJob(
            skeleton, layer, checkpoint.weights, inputs, outputs, mlp_inputs,
            {Grid(4, group_size, True, rounded=False): linears}, 2, 0, emit, lambda name: None,
        )  # fmt: skip
        quantize_layer(job)
        inputs, outputs = outputs, inputs
    return changed


def check_folding(folder: Path, group_size: int, vocabulary: int, stored: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, vocabulary, (6, 64), generator=generator)
    unseen = torch.randint(0, vocabulary, (4, 48), generator=generator)
    weights = open_checkpoint(folder).weights
    changed = folded_weights(folder, tokens, group_size, stored)
    wanted, wanted_experts = stream_logits(folder, weights, unseen)
    found, found_experts = stream_logits(folder, ReplacedWeights(weights, changed), unseen)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3
    for wanted_layer, found_layer in zip(wanted_experts, found_experts, strict=True):
        assert torch.equal(wanted_layer, found_layer)
    return changed


@pytest.mark.slow
def test_folding_leaves_tiny_r1_as_it_is(tiny_r1: Path) -> None:
    changed = check_folding(tiny_r1, 128, 1280)
    norm = changed["model.layers.1.post_attention_layernorm.weight"]
    original = open_checkpoint(tiny_r1).weights["model.layers.1.post_attention_layernorm.weight"]
    assert not torch.equal(norm, original), "the search should have scaled something"


@pytest.mark.parametrize(
    "outliers", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "outliers in every norm"]
)
def test_folding_leaves_a_ragged_random_r1_as_it_is(tmp_path: Path, outliers: bool) -> None:
    check_folding(make_pico_r1(tmp_path / "model", outliers=outliers, **NARROW | {"intermediate_size": 192}), 64, 300)


def test_what_is_stored_beside_the_quantized_linears_routes_the_same_experts(tmp_path: Path) -> None:
    check_folding(make_pico_r1(tmp_path / "model", outliers=True, **NARROW), 64, 300, stored=True)


def test_folding_leaves_shared_value_heads_and_biases_as_they_are(tmp_path: Path) -> None:
    check_folding(make_dense(tmp_path / "model", QWEN2 | {"hidden_size": 128, "head_dim": 32}), 64, 300)


def test_a_queries_projection_without_a_bottleneck_is_folded_too(tmp_path: Path) -> None:
    from checkpoints import FP8, PICO_R1, r1_shapes, random_weights, save_checkpoint, stored

    config = {**PICO_R1, **NARROW, "q_lora_rank": None, "quantization_config": FP8}
    shapes = {name: shape for name, shape in r1_shapes({**PICO_R1, **NARROW}).items() if ".q_a" not in name}
    for name in [name for name in shapes if name.endswith("q_b_proj.weight")]:
        shapes[name.replace("q_b_proj", "q_proj")] = (shapes.pop(name)[0], config["hidden_size"])
    check_folding(save_checkpoint(tmp_path / "m", config, stored(random_weights(shapes), fp8=True)), 64, 300)
