"""The metric of a linear's outputs is the mean outer product of their gradients in transformers' whole model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LLAMA, full_model, make_dense, make_pico_r1
from shapes import SMALLEST

from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.activations import Activations
from dsquant.model.gated import GatedWeights
from dsquant.model.gradients import LayerStates
from dsquant.model.skeleton import Skeleton
from dsquant.quantization.gradient_pass import GradientPass, take_back
from dsquant.quantization.layer import run_original
from dsquant.quantization.layer_job import LayerGradients, LayerJob
from dsquant.quantization.output_metrics import attention_metrics, mlp_metrics


def found_metrics(folder: Path, tokens_NT: torch.Tensor, work: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Linear -> its metric, and the gradients of the last layer's outputs."""
    checkpoint = open_checkpoint(folder)
    passing = GradientPass(Skeleton(checkpoint), checkpoint.weights, tokens_NT, work, 2, 0, lambda *told: None)
    hidden = passing.forwards()
    gradients = passing.predict(hidden[-1])
    last_NTH = gradients.samples(0, len(tokens_NT)).clone()
    found: dict[str, torch.Tensor | None] = {}

    def visit(job: LayerJob, states: LayerStates) -> None:
        outputs = Activations(states.gradients.samples(0, len(tokens_NT)).clone())
        routing = run_original(job).routing
        known = replace(job, gradients=LayerGradients(outputs, states.attended))

        for mlp in job.layer.mlps:
            original = GatedWeights.read(job.weights, mlp)
            found.update(zip(mlp.linears, mlp_metrics(known, mlp, original, routing), strict=True))
        take_back(job, states, routing)
        found.update(attention_metrics(known, job.layer.attention_linears))

    passing.backwards(hidden, gradients, visit)
    return {linear: metric_OO for linear, metric_OO in found.items() if metric_OO is not None}, last_NTH


@pytest.mark.parametrize("make", [pytest.param("R1", marks=pytest.mark.slow), "Llama"])
def test_metrics_are_those_of_the_whole_model(make: str, tmp_path: Path) -> None:
    target = tmp_path / "model"
    folder = make_dense(target, LLAMA) if make == "Llama" else make_pico_r1(target, outliers=True, **SMALLEST)
    tokens_NT = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(1))
    found, last_NTH = found_metrics(folder, tokens_NT, tmp_path)

    model: Any = full_model(folder, open_checkpoint(folder).weights)
    linears = {name: module for name, module in model.named_modules() if name in found}
    outputs: dict[str, torch.Tensor] = {}
    layers: list[torch.Tensor] = []
    for name, module in linears.items():
        module.register_forward_hook(lambda _, inputs, output, name=name: outputs.update({name: output}))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, output: layers.append(output))
    embedded = model.model.embed_tokens(tokens_NT).detach().requires_grad_()
    model(inputs_embeds=embedded, use_cache=False)
    wanted = torch.autograd.grad(layers[-1], list(outputs.values()), last_NTH)
    assert len(outputs) >= 14
    for name, gradient in zip(outputs, wanted, strict=True):
        flat_RO = gradient.flatten(0, -2)
        metric_OO = flat_RO.T @ flat_RO / len(flat_RO)
        assert float((found[name] - metric_OO).norm() / metric_OO.norm()) < 1e-4, name
