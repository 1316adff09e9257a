"""Gradients of streamed layers are those of transformers' whole model; drawn tokens follow the model's predictions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LLAMA, full_model, make_dense, make_pico_r1
from shapes import SMALLEST

from dsquant.formats.checkpoints import open_checkpoint
from dsquant.formats.wanted import Choosable
from dsquant.model.fused_attention import SameEveryTime
from dsquant.model.gradients import LayerStates, head_gradients
from dsquant.model.skeleton import Skeleton
from dsquant.precision import sensitivity
from dsquant.precision.layer_errors import Trial, measure_layer
from dsquant.precision.sensitivity import SensitivityPass, measured
from dsquant.quantization.gradient_pass import GradientPass
from dsquant.schemes import Grid


def small_r1(folder: Path) -> Path:
    return make_pico_r1(folder, outliers=True, **SMALLEST)


def small_llama(folder: Path) -> Path:
    return make_dense(folder, LLAMA)


@pytest.mark.parametrize("make", [pytest.param(small_r1, marks=pytest.mark.slow), small_llama])
def test_gradients_of_streamed_layers_equal_the_whole_models(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    skeleton = Skeleton(checkpoint)
    tokens = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(1))
    outputs, found = {}, {}

    def watched(job: Any, trials: Any, states: LayerStates) -> Any:
        outputs[job.layer.index] = states.gradients.samples(0, 3)
        errors = measure_layer(job, trials, states)
        found[job.layer.index] = states.attended.samples(0, 3), states.gradients.samples(0, 3)
        return errors

    monkeypatch.setattr(sensitivity, "measure_layer", watched)
    passing = GradientPass(skeleton, checkpoint.weights, tokens, tmp_path, 2, 0, lambda *told: None)
    assert measured(SensitivityPass({}, passing, lambda layer: {}, ())) == {}

    model: Any = full_model(folder, checkpoint.weights)
    attended: list[torch.Tensor] = []
    layers: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: attended.append(inputs[0]))
        layer.register_forward_hook(lambda _, inputs, output: layers.append(output))
    embedded = model.model.embed_tokens(tokens).detach().requires_grad_()
    model(inputs_embeds=embedded, use_cache=False)
    last = outputs[len(layers) - 1]
    wanted = torch.autograd.grad(layers[-1], [*attended, embedded, *layers[:-1]], last)
    for index in range(len(layers)):
        for one, other in zip(found[index], (wanted[index], wanted[len(layers) + index]), strict=True):
            assert float((one - other).norm() / other.norm()) < 1e-5, index


def test_attentions_gradients_that_repeat_are_those_of_the_fused_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 4, 24, 16, generator=generator, requires_grad=True) for _ in range(3)]
    how = {"is_causal": True, "scale": 0.3}
    wanted, found = (
        torch.nn.functional.scaled_dot_product_attention(*parts, **how),
        SameEveryTime.apply(*parts, None, how),
    )
    of_output = torch.randn(wanted.shape, generator=generator)
    assert torch.equal(wanted, found)
    for one, other in zip(*(torch.autograd.grad(output, parts, of_output) for output in (wanted, found)), strict=True):
        assert torch.equal(one, other)
    assert not torch.are_deterministic_algorithms_enabled()


def test_gradients_at_the_head_are_of_tokens_drawn_from_the_predictions(tmp_path: Path) -> None:
    """Their mean is zero, and their mean square, times a small change, is twice the divergence that it causes."""
    folder = make_dense(tmp_path / "model", LLAMA)
    weights = open_checkpoint(folder).weights
    skeleton = Skeleton(open_checkpoint(folder))
    model: Any = full_model(folder, weights)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 8, skeleton.config["hidden_size"], generator=generator)
    change = 0.03 * torch.randn(hidden.shape, generator=generator)

    with torch.no_grad():
        of_original, changed = (
            model.lm_head(model.model.norm(one)).log_softmax(-1) for one in (hidden, hidden + change)
        )
    divergence = float((of_original.exp() * (of_original - changed)).sum())
    products = []
    for seed in range(400):
        draws = torch.Generator().manual_seed(seed)
        products.append((head_gradients(skeleton, weights, hidden.clone(), draws) * change).sum(-1))
    found = torch.cat(products)
    assert float(found.square().mean(0).sum()) / 2 == pytest.approx(divergence, rel=0.15)
    assert float(found.mean().abs()) < 5 * float(found.std()) / found.numel() ** 0.5


def test_what_embedding_and_head_cost_is_the_divergence_of_a_model_that_has_them(tmp_path: Path) -> None:
    folder = make_dense(tmp_path / "model", LLAMA)
    weights = open_checkpoint(folder).weights
    skeleton = Skeleton(open_checkpoint(folder))
    tokens = torch.randint(0, 300, (12, 32), generator=torch.Generator().manual_seed(1))
    noise = {name: 0.003 * torch.randn(weights.shape(name)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    groups = [Choosable(name, None, (name.removesuffix(".weight"),), {"Q4_0": 1}) for name in noise]

    def store(group: Choosable, width: str, linear: str, rows: torch.Tensor, moments: Any) -> torch.Tensor:
        whole = weights[group.name]
        places = [(whole == row).all(1).nonzero()[0, 0] for row in rows]
        return rows + noise[group.name][torch.stack(places)]

    grid = Grid(4, 32, False, rounded=False)
    passing = GradientPass(skeleton, weights, tokens, tmp_path, 2, 0, lambda *told: None)
    errors = measured(SensitivityPass({grid: Trial(groups, store)}, passing, lambda layer: {}, ()))[grid]
    original = full_model(folder, weights)
    for name in noise:
        changed = full_model(folder, {**weights, name: weights[name] + noise[name]})
        with torch.no_grad():
            of_original, of_changed = (model(tokens).logits.log_softmax(-1) for model in (original, changed))
        divergence = float((of_original.exp() * (of_original - of_changed)).sum(-1).mean())
        assert errors[name]["Q4_0"] == pytest.approx(divergence, rel=0.3), name
