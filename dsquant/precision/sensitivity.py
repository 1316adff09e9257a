"""The pass that precedes a choice: every group of tensors at every width, on a few samples; then the bytes are divided.

Errors of different layers compare by their share of the layer's output: hidden states grow from layer to layer, and
every norm divides by their size, so that the same squared error costs more behind an early layer (docs/decisions/0016).
What the pass finds is plain JSON, for the job's record. A pass that was interrupted begins anew.

Shape legend: N samples, T tokens.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import torch

from dsquant.errors import InputError
from dsquant.model.activations import Activations
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import embed
from dsquant.model.structure import DecoderLayer
from dsquant.precision.allocation import Choice, Width, allocate
from dsquant.precision.groups import MixedPlan
from dsquant.precision.layer_errors import Errors, Store, Trial, measure_layer
from dsquant.quantization.layer_job import LayerJob, Note
from dsquant.recipes import Step
from dsquant.reporting.progress import Stage
from dsquant.schemes import UNQUANTIZED, Grid
from dsquant.source.weights import Weights

# Sensitivities are measured on at most this many samples.
SAMPLES = 16
# Under this the job notes what was found.
SENSITIVITY = "sensitivity"


@dataclass(frozen=True)
class SensitivityPass(Generic[Width]):
    """What the pass needs."""

    mixed: MixedPlan
    skeleton: Skeleton
    weights: Weights
    tokens_NT: torch.Tensor
    """Calibration tokens, int64; the first `SAMPLES` samples are taken."""
    linears_of: Callable[[DecoderLayer], Mapping[Grid, frozenset[str]]]
    """Gives the grid that a layer's scales are searched for, and the linears that it is for."""
    store: Store[Width]
    steps: tuple[Step, ...]
    """Of the quantization."""
    work: Path
    """The folder for hidden states."""
    batch_samples: int
    seed: int
    safe_point: Callable[[Stage, int, int, str], None]
    note: Note = field(default=lambda grid, linear, importance: None)


def choose(own: SensitivityPass[Width]) -> dict[str, dict[str, Any]]:
    """Measures every group and divides the bytes.

    Args:
        own: the pass.

    Returns:
        Group -> its `width`, and `bytes` and `errors` of every width.

    Raises:
        InputError: where the original's hidden states are not finite.
        Interrupted: at a safe point, where the job has to stop.
    """
    errors = _errors(own)
    choices = [Choice(group.name, group.num_bytes, errors[group.name]) for group in own.mixed.groups]
    widths = allocate(choices, own.mixed.budget_bytes)
    return {
        choice.name: {
            "width": widths[choice.name],
            "bytes": {str(width): size for width, size in choice.num_bytes.items()},
            "errors": {str(width): error for width, error in choice.errors.items()},
        }
        for choice in choices
    }


def _errors(own: SensitivityPass[Width]) -> Errors[Width]:
    """Group -> width -> error over the energy of the layer's output, 0 where it is not quantized."""
    skeleton, tokens_NT = own.skeleton, own.tokens_NT[:SAMPLES]
    shape = (*tokens_NT.shape, int(skeleton.config["hidden_size"]))
    files = [own.work / f"sensitivity-{name}.f32" for name in ("inputs", "outputs", "mlp-inputs")]
    inputs, outputs, mlp_inputs = (
        Activations.in_file(path, shape, own.weights.device, torch.float32) for path in files
    )
    embed(skeleton, own.weights, tokens_NT, inputs)
    found: Errors[Width] = {group.name: dict.fromkeys(group.num_bytes, 0.0) for group in own.mixed.groups}
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
        )
        measured = measure_layer(job, _trial(own, layer))
        for name, errors in measured.errors.items():
            if not all(map(math.isfinite, errors.values())):
                raise InputError(f"{name}: its error is not finite; its weights are out of any sensible range")
            found[name] |= {width: error / (measured.energy or 1.0) for width, error in errors.items()}
        inputs, outputs = outputs, inputs
    own.safe_point("sensitivity", len(layers), len(layers), "")
    del inputs, outputs, mlp_inputs, job
    for path in files:
        path.unlink()
    return found


def _trial(own: SensitivityPass[Width], layer: DecoderLayer) -> Trial[Width]:
    groups = [group for group in own.mixed.groups if group.layer == layer.index]
    widths = {group.name: [width for width in group.num_bytes if width != UNQUANTIZED] for group in groups}
    return Trial({group.name: group.linears for group in groups}, widths, own.store)
