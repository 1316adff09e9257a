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
from pathlib import Path
from typing import Any, Generic

import torch

from dsquant.errors import InputError
from dsquant.jobs.ranks import ALONE, Ranks, Shares
from dsquant.model.activations import Activations
from dsquant.model.gradients import LayerStates, head_gradients
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import embed
from dsquant.model.structure import DecoderLayer
from dsquant.precision.allocation import GroupCosts, Width, allocate
from dsquant.precision.groups import MixedPlan
from dsquant.precision.layer_errors import Errors, Trial, measure_layer
from dsquant.precision.table_errors import embedding_errors, head_errors
from dsquant.presets import Step
from dsquant.quantization.layer import check_outputs, run_original
from dsquant.quantization.layer_job import LayerJob, Note
from dsquant.quantization.layer_mlps import own_mlps
from dsquant.quantization.sharing import share_rows
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
    in_blocks: Mapping[Grid, frozenset[str]] = field(default_factory=dict)
    """Grid -> linears that stay in FP8 blocks."""

    def job_of(
        self,
        layer: DecoderLayer,
        inputs: Activations,
        outputs: Activations,
        mlp_inputs: Activations,
        safe_point: Callable[[str], None],
    ) -> LayerJob:
        """Returns what running a layer takes."""
        return LayerJob(
            skeleton=self.skeleton,
            layer=layer,
            weights=self.weights,
            inputs=inputs,
            outputs=outputs,
            mlp_inputs=mlp_inputs,
            linears=self.linears_of(layer),
            in_blocks=self.in_blocks,
            batch_samples=self.batch_samples,
            seed=self.seed,
            emit=lambda grid, name, value: None,
            safe_point=safe_point,
            note=self.note,
            steps=self.steps,
            ranks=self.ranks,
        )


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
    tokens_NT, layers = own.tokens_NT[:SAMPLES], own.skeleton.layers[: own.skeleton.num_layers]
    shape = (*tokens_NT.shape, int(own.skeleton.config["hidden_size"]))

    def opened(name: object) -> Activations:
        path = own.work / f"sensitivity-{name}.f32"
        return Activations.in_file(path, shape, own.weights.device, torch.float32)

    def safe_point(number: int, what: str) -> None:
        own.safe_point("sensitivity", number, 2 * len(layers), what)

    hidden = [opened(number) for number in range(len(layers) + 1)]
    spare, gradients, attended = (opened(name) for name in ("mlp-inputs", "gradients", "attended"))
    own.ranks.once(lambda: _begin(own, tokens_NT, hidden[0]))
    for number, layer in enumerate(layers):
        run = own.job_of(layer, hidden[number], hidden[number + 1], spare, partial(safe_point, number))
        _run_forward(replace(run, linears={}))
    of_head = partial(head_errors, own.skeleton, own.weights, hidden[-1])
    tables = [_table_errors(own, of_head, partial(safe_point, len(layers), "head"))]
    _predict(own, hidden[-1], gradients)  # layers overwrite their outputs from here on
    found: Errors[Width] = {grid: {} for grid in own.trials}
    for number, layer in enumerate(reversed(layers)):
        states = LayerStates(hidden[layer.index], gradients, attended)
        passing = partial(safe_point, len(layers) + number)
        job = own.job_of(layer, states.inputs, hidden[layer.index + 1], spare, passing)
        trials = {
            grid: replace(trial, groups=[group for group in trial.groups if group.layer == layer.index])
            for grid, trial in own.trials.items()
        }
        for grid, groups in measure_layer(job, trials, states).items():
            found[grid] |= groups
    of_embedding = partial(embedding_errors, own.weights, tokens_NT, gradients)
    tables.append(_table_errors(own, of_embedding, partial(safe_point, 2 * len(layers), "embedding")))
    for grid, name, width, error in chain(*tables):
        errors = found[grid].setdefault(name, {})
        errors[width] = errors.get(width, 0.0) + error  # one table may be both
    safe_point(2 * len(layers), "")
    return {
        grid: {name: _by_token(name, errors, tokens_NT.numel()) for name, errors in groups.items()}
        for grid, groups in found.items()
    }


def _begin(own: SensitivityPass[Width], tokens_NT: torch.Tensor, hidden: Activations) -> None:
    embed(own.skeleton, own.weights, tokens_NT, hidden)
    hidden.flush()


def _run_forward(job: LayerJob) -> None:
    """Runs an original layer."""
    job.safe_point(job.layer.prefix)
    _, _, routing = run_original(job)
    for _ in own_mlps(job, routing):
        pass
    job.ranks.together(lambda: check_outputs(job))


def _predict(own: SensitivityPass[Width], hidden: Activations, gradients: Activations) -> None:
    """Fills in the gradients of the last hidden states, each sample's with a seed of its own."""
    shares = Shares(hidden.shape[0], own.batch_samples, own.ranks.size)
    for sample in range(*shares.samples(own.ranks.rank)):
        draws = torch.Generator().manual_seed(own.seed + sample)
        found = head_gradients(own.skeleton, own.weights, hidden.samples(sample, sample + 1), draws)
        gradients.set_samples(sample, found)
    share_rows(gradients, own.ranks, shares)


def _table_errors(
    own: SensitivityPass[Width],
    errors_of: Callable[[Trial[Width]], Iterable[tuple[str, Width, float]]],
    safe_point: Callable[[], None],
) -> list[tuple[Grid, str, Width, float]]:
    """Errors of embedding or head, on every rank."""

    def measure(beat: Callable[[], None]) -> list[tuple[Grid, str, Width, float]]:
        def watched(trial: Trial[Width], *arguments: Any) -> torch.Tensor:
            safe_point()
            beat()
            return trial.store(*arguments)

        trials = {grid: replace(trial, store=partial(watched, trial)) for grid, trial in own.trials.items()}
        return [(grid, *found) for grid, trial in trials.items() for found in errors_of(trial)]

    return own.ranks.alone(measure)


def _by_token(name: str, errors: Mapping[Width, float], num_tokens: int) -> dict[Width, float]:
    if not all(map(math.isfinite, errors.values())):
        raise InputError(f"{name}: its error is not finite; its weights are out of any sensible range")
    return {width: error / num_tokens for width, error in errors.items()}
