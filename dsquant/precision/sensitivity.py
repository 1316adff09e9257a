"""The pass that precedes a choice: every group of tensors at every width, on a few samples; then the bytes are divided.

Errors of different layers compare by their share of the layer's output: hidden states grow from layer to layer, and
every norm divides by their size, so that the same squared error costs more behind an early layer (docs/decisions/0016).
The choices are plain JSON, for the job's record. A pass that was interrupted starts over.

Shape legend: N samples, T tokens.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic

import torch

from dsquant.errors import InputError
from dsquant.jobs.ranks import ALONE, Ranks
from dsquant.model.activations import Activations
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import embed
from dsquant.model.structure import DecoderLayer
from dsquant.precision.allocation import GroupCosts, Width, allocate
from dsquant.precision.groups import MixedPlan
from dsquant.precision.layer_errors import Errors, Sensitivity, Trial, measure_layer
from dsquant.presets import Step
from dsquant.quantization.layer_job import LayerJob, Note
from dsquant.reporting.progress import Stage
from dsquant.schemes import Grid
from dsquant.source.weights import Weights

# Sensitivities are measured on at most this many samples.
SAMPLES = 16
# Under this the job notes what was found.
SENSITIVITY = "sensitivity"


@dataclass(frozen=True)
class SensitivityPass(Generic[Width]):
    """The arguments of the pass."""

    trials: Mapping[Grid, Trial[Width]]
    """The groups and widths to try on each grid, of all layers."""
    skeleton: Skeleton
    weights: Weights
    tokens_NT: torch.Tensor
    """Calibration tokens, int64; the first `SAMPLES` samples are taken."""
    linears_of: Callable[[DecoderLayer], Mapping[Grid, frozenset[str]]]
    """Gives the grids that a layer's scales are searched for, and the linears that each is for."""
    steps: tuple[Step, ...]
    """Of the quantization."""
    work: Path
    """The folder for hidden states."""
    batch_samples: int
    seed: int
    safe_point: Callable[[Stage, int, int, str], None]
    note: Note = field(default=lambda grid, linear, importance: None)
    ranks: Ranks = ALONE
    """Who shares it."""


def choose(mixed: MixedPlan, errors: Mapping[str, Mapping[Width, float]]) -> dict[str, dict[str, Any]]:
    """Divides the bytes of one output: group -> its `width`, and `bytes` and `errors` of every width."""
    choices = [
        GroupCosts(group.name, group.num_bytes, {width: errors[group.name][width] for width in group.num_bytes})
        for group in mixed.groups
    ]
    widths = allocate(choices, mixed.budget_bytes)
    return {
        choice.name: {
            "width": widths[choice.name],
            "bytes": {str(width): size for width, size in choice.num_bytes.items()},
            "errors": {str(width): error for width, error in choice.errors.items()},
        }
        for choice in choices
    }


def measured(own: SensitivityPass[Width]) -> Errors[Width]:
    """Measures every group at every width: errors over the energy of the layer's output, on every rank.

    Raises InputError where the original's hidden states are not finite, and Interrupted at a safe point where the job
    has to stop.
    """
    skeleton, tokens_NT = own.skeleton, own.tokens_NT[:SAMPLES]
    shape = (*tokens_NT.shape, int(skeleton.config["hidden_size"]))
    inputs, outputs, mlp_inputs = (
        Activations.in_file(own.work / f"sensitivity-{name}.f32", shape, own.weights.device, torch.float32)
        for name in ("inputs", "outputs", "mlp-inputs")
    )

    def begin() -> None:
        embed(skeleton, own.weights, tokens_NT, inputs)
        inputs.flush()

    own.ranks.once(begin)
    found: Errors[Width] = {grid: {} for grid in own.trials}
    layers = skeleton.layers[: skeleton.num_layers]
    for number, layer in enumerate(layers):

        def safe_point(what: str, number: int = number) -> None:
            own.safe_point("sensitivity", number, len(layers), what)

        safe_point(layer.prefix)
        job = LayerJob(
            skeleton=skeleton,
            layer=layer,
            weights=own.weights,
            inputs=inputs,
            outputs=outputs,
            mlp_inputs=mlp_inputs,
            linears=own.linears_of(layer),
            batch_samples=own.batch_samples,
            seed=own.seed,
            emit=lambda grid, name, value: None,
            safe_point=safe_point,
            note=own.note,
            steps=own.steps,
            ranks=own.ranks,
        )
        layers_own = {
            grid: replace(trial, groups=[group for group in trial.groups if group.layer == layer.index])
            for grid, trial in own.trials.items()
        }
        _add_relative(found, measure_layer(job, layers_own))
        inputs, outputs = outputs, inputs
    own.safe_point("sensitivity", len(layers), len(layers), "")
    return found


def _add_relative(found: Errors[Width], layer: Sensitivity[Width]) -> None:
    """Adds a layer's errors, over the energy of its output."""
    for grid, groups in layer.errors.items():
        for name, errors in groups.items():
            if not all(map(math.isfinite, errors.values())):
                raise InputError(f"{name}: its error is not finite; its weights are out of any sensible range")
            found[grid][name] = {width: error / (layer.energy or 1.0) for width, error in errors.items()}
