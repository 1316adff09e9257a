"""The job of quantizing a decoder layer, and its report.

Shape legend: N samples, T tokens, H hidden size, I in features.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from dsquant.jobs.ranks import ALONE, Ranks, Shares
from dsquant.model.activations import Activations
from dsquant.model.skeleton import Skeleton
from dsquant.model.structure import DecoderLayer, ScaleGroup
from dsquant.presets import PRESET_STEPS, Step
from dsquant.quantization.statistics import Importance
from dsquant.schemes import QuantizedWeight, Scheme
from dsquant.source.weights import Weights

Emit = Callable[[Scheme, str, QuantizedWeight | torch.Tensor], None]
"""Gets the grid, and a linear's name with its quantized weight or a folded parameter's name with its float32 values;
parameters that are not emitted have not changed."""

Note = Callable[[Scheme, str, Importance], None]
KeepScales = Callable[[Scheme, str, torch.Tensor], None]
"""Gets the grid, a producer (a norm or a linear) and the scales that its output is divided by, float32 [I]."""


@dataclass(frozen=True)
class QuantizedStream:
    """The hidden states of the quantized model, next to the original's."""

    inputs: Activations
    """The layer's inputs from the quantized layers before it [N, T, H]."""
    outputs: Activations
    """Gets the quantized layer's outputs."""
    mlp_inputs: Activations
    """Gets the MLPs' inputs behind quantized attention."""


@dataclass(frozen=True)
class LayerGradients:
    """The gradients of what the original predicts, for the first samples (`gradient_pass`)."""

    outputs: Activations
    """Of the layer's outputs [N, T, H]."""
    attended: Activations
    """Of the hidden states behind attention [N, T, H]."""


@dataclass(frozen=True)
class LayerJob:
    """Everything that quantizing a layer needs."""

    skeleton: Skeleton
    layer: DecoderLayer
    weights: Weights
    inputs: Activations
    """The original layer's inputs [N, T, H]."""
    outputs: Activations
    """Gets the original layer's outputs."""
    mlp_inputs: Activations
    """Gets the MLPs' inputs."""
    linears: Mapping[Scheme, frozenset[str]]
    """Grid -> the layer's linears that are quantized onto it."""
    batch_samples: int
    seed: int
    emit: Emit
    safe_point: Callable[[str], None]
    """Called with a module's name before its work begins; may raise to stop."""
    note: Note = lambda grid, linear, importance: None
    """Gets the importance of each linear's inputs under the scales, for grids whose formats want to know (`noted`)."""
    keep_scales: KeepScales = lambda grid, producer, scales: None
    """Gets all scales that are folded in, so that a later release can be quantized under them."""

    schemes: Mapping[Scheme, Mapping[str, Scheme]] = field(default_factory=dict)
    """Grid -> linear -> its scheme, where that is not the grid: scales are searched for the grid all the same."""
    in_blocks: Mapping[Scheme, frozenset[str]] = field(default_factory=dict)
    """Grid -> linears that stay in FP8 blocks, into which only powers of two are folded."""
    packed: Mapping[Scheme, frozenset[str]] = field(default_factory=dict)
    """Grid -> linears that keep the source's integers, into which nothing is folded."""
    steps: Collection[Step] = PRESET_STEPS["compact"]
    """Of the quantization; `follow` is one where there is `quantized`."""
    quantized: Mapping[Scheme, QuantizedStream] = field(default_factory=dict)
    """Grid -> the hidden states of the model quantized onto it, where linears are rounded for them."""
    gradients: LayerGradients | None = None
    """Where later rows compensate what errors of earlier ones do to predictions."""
    ranks: Ranks = ALONE
    """Who shares the layer. Each emits what it has quantized; rank 0 has all that is not an MLP."""

    @property
    def shares(self) -> Shares:
        """Which rank has which samples."""
        return Shares(self.inputs.shape[0], self.batch_samples, self.ranks.size)

    @property
    def grids(self) -> tuple[Scheme, ...]:
        return tuple(self.linears)

    def grid_of(self, grid: Scheme, linear: str) -> Scheme:
        """Returns the scheme that a linear is rounded to, where scales are searched for `grid`."""
        return self.schemes.get(grid, {}).get(linear, grid)

    def scales_blocks(self, grid: Scheme, group: ScaleGroup) -> bool:
        """Returns whether a group's scales are folded into a linear that stays in FP8 blocks."""
        return not self.in_blocks.get(grid, frozenset()).isdisjoint((group.producer, *group.consumers))

    def folds(self, grid: Scheme, group: ScaleGroup) -> bool:
        """Returns whether scales are searched for a group: where no linear of it keeps the source's integers."""
        return "scales" in self.steps and self.packed.get(grid, frozenset()).isdisjoint(
            (group.producer, *group.consumers)
        )

    def rounds(self, grid: Scheme, linear: str) -> bool:
        """Returns whether a linear is rounded here; else it is emitted folded, to a format that rounds it itself."""
        return self.grid_of(grid, linear).rounded

    def anywhere(self, linear: str) -> bool:
        """Returns whether a linear is quantized onto any grid."""
        return any(linear in linears for linears in self.linears.values())

    def compensates(self, linear: str) -> bool:
        """Returns whether a linear's rounding errors are compensated on any grid."""
        rounded = any(linear in linears and self.rounds(grid, linear) for grid, linears in self.linears.items())
        return rounded and "compensate" in self.steps


@dataclass
class GridReport:
    """The cost of quantizing a layer onto one grid: squared output errors relative to the output."""

    attention_error: float | None = None
    attention_error_plain: float | None = None
    mlp_error: float | None = None
    mlp_error_plain: float | None = None
    fallbacks: list[str] = field(default_factory=list)
    """Modules where the search did not beat plain rounding."""
    weight_errors: dict[str, float] = field(default_factory=dict)
    """Linear -> the rounded weight's distance from the folded one, over the folded one's norm."""


@dataclass
class LayerReport:
    """The outcome for one layer."""

    tokens_per_expert: list[int]
    """Empty for a dense layer."""
    topped_up: dict[int, int]
    """Expert -> tokens added to its own because it had fewer than `FEWEST_TOKENS`."""
    grids: list[GridReport]
