"""The pass that precedes a choice: every group of tensors at every width, on a few samples; then the bytes are divided.

An error counts by the KL divergence that it causes at the model's output (docs/decisions/0028). The choices are plain
JSON, for the job's record. A pass that was interrupted starts over.

Shape legend: N samples, T tokens.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Generic

import torch

from dsquant.errors import InputError
from dsquant.model.gradients import LayerStates
from dsquant.model.structure import DecoderLayer
from dsquant.precision.allocation import GroupCosts, Width, allocate
from dsquant.precision.groups import MixedPlan
from dsquant.precision.layer_errors import Errors, Trial, measure_layer
from dsquant.precision.table_errors import embedding_errors, head_errors
from dsquant.presets import Step
from dsquant.quantization.gradient_pass import GradientPass
from dsquant.quantization.layer_job import LayerJob, Note
from dsquant.schemes import Scheme

# Sensitivities are measured on at most this many samples.
SAMPLES = 16
# Under this the job notes what was found.
SENSITIVITY = "sensitivity"


@dataclass(frozen=True)
class SensitivityPass(Generic[Width]):
    """The arguments of the pass."""

    trials: Mapping[Scheme, Trial[Width]]
    """The groups and widths to try on each grid, of all layers."""
    gradients: GradientPass
    """On at most `SAMPLES` samples."""
    linears_of: Callable[[DecoderLayer], Mapping[Scheme, frozenset[str]]]
    """Gives the grids that a layer's scales are searched for, and the linears that each is for."""
    steps: tuple[Step, ...]
    """Of the quantization."""
    note: Note = field(default=lambda grid, linear, importance: None)
    in_blocks: Mapping[Scheme, frozenset[str]] = field(default_factory=dict)
    """Grid -> linears that stay in FP8 blocks."""

    def tried(self, job: LayerJob) -> LayerJob:
        """Returns the job of a layer whose linears are tried."""
        linears = self.linears_of(job.layer)
        return replace(job, linears=linears, in_blocks=self.in_blocks, note=self.note, steps=self.steps)


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
    """Measures every group at every width: the KL divergence that it causes, in nats a token, on every rank.

    The original runs once forwards; its hidden states are kept. Then layers pass from the last to the first, each with
    the gradients of its outputs. Raises InputError where hidden states are not finite, and Interrupted at a safe point
    where the job has to stop.
    """
    passing, num_layers = own.gradients, len(own.gradients.layers)
    hidden = passing.forwards()
    of_head = partial(head_errors, passing.skeleton, passing.weights, hidden[-1])
    tables = [_table_errors(own, of_head, partial(passing.passing, num_layers, "head"))]
    gradients = passing.predict(hidden[-1])
    found: Errors[Width] = {grid: {} for grid in own.trials}

    def visit(job: LayerJob, states: LayerStates) -> None:
        trials = {
            grid: replace(trial, groups=[group for group in trial.groups if group.layer == job.layer.index])
            for grid, trial in own.trials.items()
        }
        for grid, groups in measure_layer(own.tried(job), trials, states).items():
            found[grid] |= groups

    passing.backwards(hidden, gradients, visit)
    of_embedding = partial(embedding_errors, passing.weights, passing.tokens_NT, gradients)
    tables.append(_table_errors(own, of_embedding, partial(passing.passing, 2 * num_layers, "embedding")))
    for grid, name, width, error in chain(*tables):
        errors = found[grid].setdefault(name, {})
        errors[width] = errors.get(width, 0.0) + error  # one table may be both
    passing.passing(2 * num_layers, "")
    return {
        grid: {name: _by_token(name, errors, passing.tokens_NT.numel()) for name, errors in groups.items()}
        for grid, groups in found.items()
    }


def _table_errors(
    own: SensitivityPass[Width],
    errors_of: Callable[[Trial[Width]], Iterable[tuple[str, Width, float]]],
    safe_point: Callable[[], None],
) -> list[tuple[Scheme, str, Width, float]]:
    """Errors of embedding or head, on every rank."""

    def measure(beat: Callable[[], None]) -> list[tuple[Scheme, str, Width, float]]:
        def watched(trial: Trial[Width], *arguments: Any) -> torch.Tensor:
            safe_point()
            beat()
            return trial.store(*arguments)

        trials = {grid: replace(trial, store=partial(watched, trial)) for grid, trial in own.trials.items()}
        return [(grid, *found) for grid, trial in trials.items() for found in errors_of(trial)]

    return own.gradients.ranks.alone(measure)


def _by_token(name: str, errors: Mapping[Width, float], num_tokens: int) -> dict[Width, float]:
    if not all(map(math.isfinite, errors.values())):
        raise InputError(f"{name}: its error is not finite; its weights are out of any sensible range")
    return {width: error / num_tokens for width, error in errors.items()}
