"""Measures how far a candidate's tensors are from the original's, with folded scales undone.

AWQ divides the output of a norm (or linear) by s and multiplies the columns of every consumer by s: the function stays
the same, the tensors do not. The fold can be read off the tensors: a norm's s is its old gain over its new one, a
linear's s is the factor that fits its rows best. Consumers are compared after dividing their columns by it, so that one
that was left out of the fold, such as a router, stands out.

Shape legend: O out features, I in features.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch

from dsquant.evaluation.results import WeightError
from dsquant.model.gated import GatedWeights
from dsquant.model.structure import ROUTER_BIAS, DecoderLayer, Mlp, ScaleGroup
from dsquant.source.weights import Weights

# Below this cosine a row is not a multiple of the original's, and no factor is read off it.
LEAST_ROW_COSINE = 0.8
# Elements of a tensor that are compared at once, in float64.
ELEMENTS_AT_ONCE = 2**22
_NUMBERS = re.compile(r"^model\.layers\.\d+\.|\.\d+(?=\.)")


@dataclass
class Moments:
    """Sums of squares of a linear's inputs, column by column."""

    parts: list[torch.Tensor] = field(default_factory=list)
    """float64 [I] of each batch of rows, in their order."""

    def add(self, inputs_RI: torch.Tensor) -> None:
        """Adds rows of inputs."""
        self.parts.append(inputs_RI.double().square().sum(0))

    @property
    def sum_I(self) -> torch.Tensor | None:
        """Of all rows, float64 [I]; None before the first rows."""
        return reduce(torch.add, self.parts) if self.parts else None


@dataclass
class Unfolding:
    """The factors that a candidate's fold multiplied and divided by."""

    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    """Linear or router -> float32 [I], the factor of each of its columns."""
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    """Linear -> float32 [O], the divisor of each of its rows."""

    def apply(self, name: str, weight_OI: torch.Tensor) -> torch.Tensor:
        """Returns a weight without its known factors."""
        if name in self.columns:
            weight_OI = weight_OI / self.columns[name]
        return weight_OI * self.rows[name].unsqueeze(1) if name in self.rows else weight_OI


def norm_factor(original_I: torch.Tensor, candidate_I: torch.Tensor) -> torch.Tensor:
    """Returns the scale folded into a norm, float32 [I]: old gain over new gain; 1 where that is 0 or not finite."""
    factor_I = original_I / candidate_I
    return torch.where(torch.isfinite(factor_I) & (factor_I != 0), factor_I, 1.0)


def row_factor(original_OI: torch.Tensor, candidate_OI: torch.Tensor) -> torch.Tensor:
    """Returns the factor on each of the candidate's rows that brings it closest to the original's (least squares).

    Both are float32 [O, I], the candidate with its columns unfolded; the factors are float32 [O], 1 where the rows
    point in different directions.
    """
    dot_O = (original_OI * candidate_OI).sum(1)
    squares_O, candidate_squares_O = original_OI.square().sum(1), candidate_OI.square().sum(1)
    alike_O = dot_O > LEAST_ROW_COSINE * (squares_O * candidate_squares_O).sqrt()
    return torch.where(alike_O & (candidate_squares_O > 0), dot_O / candidate_squares_O, 1.0)


@dataclass(frozen=True)
class ErrorSums:
    """What tells a tensor's errors, where it was added up: a GPU would have to finish before it is asked."""

    name: str
    layer: int | None
    sums: torch.Tensor
    """float64: squares of the difference and of the original; of a weight with known inputs both as these weigh them
    as well."""

    def error(self) -> WeightError:
        """Returns the relative errors: 0 where both tensors are zero, infinite where only the original is."""
        found = self.sums.tolist()
        weighted = relative_error(found[2], found[3]) if len(found) > 2 else None
        return WeightError(self.name, self.layer, relative_error(found[0], found[1]), weighted)


def error_sums(
    name: str, layer: int | None, original: torch.Tensor, candidate: torch.Tensor, moments: Moments | None = None
) -> ErrorSums:
    """Compares two float32 tensors of the same shape, the candidate's unfolded; `moments` are those of a weight's
    inputs."""
    weights_I = None if moments is None else moments.sum_I
    sums = torch.zeros(2 if weights_I is None else 4, dtype=torch.float64, device=original.device)
    for wanted, found in zip(in_parts(original), in_parts(candidate), strict=True):
        for number, values in enumerate((found - wanted, wanted)):
            squares = values.double().square_()
            sums[number] += squares.sum()
            if weights_I is not None:
                sums[2 + number] += (squares @ weights_I).sum()
    return ErrorSums(name, layer, sums)


def in_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Splits a tensor into parts of rows that fit in memory in float64."""
    return tensor.split(max(1, ELEMENTS_AT_ONCE // max(1, math.prod(tensor.shape[1:]))))


def relative_error(error: float, size: float) -> float:
    """Returns the root of a ratio of sums of squares; 0 for 0 / 0, infinite for anything else over 0 and for NaN."""
    if not (math.isfinite(error) and math.isfinite(size)):
        return math.inf
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return (error / size) ** 0.5


@dataclass
class LayerComparison:
    """Compares a layer's tensors: first its dense part, then its experts, in any order; `moments` are those of the
    original's inputs, by linear."""

    layer: DecoderLayer
    unfolding: Unfolding = field(default_factory=Unfolding)
    sums: list[ErrorSums] = field(default_factory=list)
    """Of the dense part."""

    def dense_part(self, original: Weights, candidate: Weights, moments: Mapping[str, Moments]) -> None:
        """Compares attention, router, and every MLP that is not routed."""
        for group in self.layer.attention:
            self._unfold(group, original, candidate)
        for linear in self.layer.attention_linears:
            self._compare(f"{linear}.weight", original, candidate, moments)
        self._unfold(self.layer.mlp_norm, original, candidate)
        router = "" if self.layer.router is None else self.layer.router.removesuffix(".weight")
        for name in (f"{router}.weight", f"{router}.{ROUTER_BIAS}") if router else ():
            if name in original and name in candidate:
                self._compare(name, original, candidate, moments)
        for mlp in self.layer.mlps:
            if mlp.kind != "routed":
                weights = GatedWeights.read(original, mlp), GatedWeights.read(candidate, mlp)
                self.sums += self.of_mlp(mlp, *weights, moments)

    def of_mlp(
        self, mlp: Mlp, original: GatedWeights, candidate: GatedWeights, moments: Mapping[str, Moments]
    ) -> list[ErrorSums]:
        """Compares one gated MLP."""
        up_WH = self.unfolding.apply(mlp.up, candidate.up_WH)
        rows_W = row_factor(original.up_WH, up_WH)
        gate_WH = self.unfolding.apply(mlp.gate, candidate.gate_WH)
        pairs = (
            (mlp.gate, original.gate_WH, gate_WH),
            (mlp.up, original.up_WH, up_WH * rows_W.unsqueeze(1)),
            (mlp.down, original.down_HW, candidate.down_HW / rows_W),
        )
        return [
            error_sums(f"{linear}.weight", self.layer.index, wanted, found, moments.get(linear))
            for linear, wanted, found in pairs
        ]

    def _unfold(self, group: ScaleGroup, original: Weights, candidate: Weights) -> None:
        """Reads off the divisor of a group's producer."""
        name = f"{group.producer}.weight"
        wanted, found = original[name], self.unfolding.apply(group.producer, candidate[name])
        if wanted.dim() == 1:
            factor = norm_factor(wanted, found)
        else:
            factor_O = row_factor(wanted, found)
            rows = list(group.producer_rows or range(len(factor_O)))
            factor = factor_O[rows]
            scaled_O = torch.ones_like(factor_O)
            scaled_O[rows] = factor
            self.unfolding.rows[group.producer] = scaled_O
        followers = (name.removesuffix(".weight") for name in group.followers)
        self.unfolding.columns.update(dict.fromkeys((*group.consumers, *followers), factor))

    def _compare(self, name: str, original: Weights, candidate: Weights, moments: Mapping[str, Moments]) -> None:
        linear = name.removesuffix(".weight")
        found = self.unfolding.apply(linear, candidate[name])
        self.sums.append(error_sums(name, self.layer.index, original[name], found, moments.get(linear)))


def worst(errors: Sequence[WeightError], count: int = 20) -> tuple[WeightError, ...]:
    """Returns the tensors with the largest errors, plain or activation-weighted, whichever is larger."""
    return tuple(
        sorted(errors, key=lambda one: max(one.relative, one.activation_weighted or 0.0), reverse=True)[:count]
    )


def module_kind(name: str) -> str:
    """Returns `mlp.experts.down_proj` for `model.layers.3.mlp.experts.17.down_proj.weight`."""
    return _NUMBERS.sub("", name).removesuffix(".weight")


def by_kind(errors: Sequence[WeightError], total: Callable[[Sequence[float]], float]) -> dict[str, float]:
    """Reduces relative errors to one number for each kind of module, with `total` (mean, median ...)."""
    groups: dict[str, list[float]] = defaultdict(list)
    for error in errors:
        groups[module_kind(error.name)].append(error.relative)
    return {kind: total(values) for kind, values in groups.items()}
