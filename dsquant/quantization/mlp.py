"""How a gated MLP (dense, shared expert or routed expert) is quantized.

Shape legend: R tokens, H hidden size, W width of the MLP.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch

from dsquant.jobs.ranks import Ranks
from dsquant.kernels.precision import fast_matmuls
from dsquant.model.activations import Activations
from dsquant.model.gated import GatedWeights
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import ROWS_AT_ONCE
from dsquant.model.structure import Mlp
from dsquant.quantization.scale import (
    ScaleChoice,
    candidate_scales,
    foldable_scales,
    powers_of_two,
    rms_of_columns,
    scale_losses,
)
from dsquant.quantization.statistics import InputMoments, InputStatistics, InverseFactor
from dsquant.quantization.steps import prepared, rounded_weight
from dsquant.recipes import Step
from dsquant.schemes import Grid, QuantizedWeight, fake_quantize, round_to_nearest
from dsquant.source.weights import Weights

# A gated MLP's own output error is measured on at most this many tokens, evenly spaced.
CHECK_ROWS = 512
# Whether folding has changed its function is seen on these.
PROOF_ROWS = 64


@dataclass(frozen=True)
class MlpInputs:
    """The tokens that an MLP is judged on."""

    activations: Activations
    """The normed hidden states of all tokens."""
    rows_R: torch.Tensor
    """int64: the tokens that reach this MLP, and any that were added because too few do."""
    weights_R: torch.Tensor | None = None
    """float32: what multiplies each token's inputs in the statistics; None where all count alike."""

    def parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """All of them and their weights, in parts of at most 4096."""
        for start in range(0, len(self.rows_R), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            yield self.rows_R[part], None if self.weights_R is None else self.weights_R[part]

    def few(self) -> torch.Tensor:
        """At most `CHECK_ROWS` of them, evenly spaced, float32 [R, H]."""
        step = max(1, -(-len(self.rows_R) // CHECK_ROWS))
        return self.activations.rows(self.rows_R[::step])

    def moments(self, seed: int) -> InputMoments:
        """The second moments of all of them."""
        statistics = InputStatistics(self.activations.shape[2], seed, self.activations.device)
        with fast_matmuls(self.activations.device):
            for rows_R, weights_R in self.parts():
                statistics.add(self.activations.rows(rows_R), weights_R)
        return statistics.moments()


@dataclass(frozen=True)
class MlpErrors:
    """What quantizing a gated MLP cost."""

    name: str
    error: float
    """Squared output error, relative to the output."""
    error_plain: float
    """The same under plain rounding, with no scales."""
    energy: float
    """Summed squared output, estimated over all tokens that reach it."""
    plain: bool
    """Whether scales and clip of this MLP were given up because they did not lower the error."""


def search_norm_scales(
    skeleton: Skeleton,
    weights: Weights,
    mlps: list[tuple[Mlp, MlpInputs]],
    norm_I: torch.Tensor,
    activation_I: torch.Tensor,
    grid: Grid,
    exact: bool,
    seed: int,
    ranks: Ranks,
) -> ScaleChoice:
    """Finds the scales of the norm that feeds a layer's MLPs.

    Args:
        skeleton: the network.
        weights: its weights.
        mlps: quantized MLPs to judge by, with the tokens that reach them.
        norm_I: the norm's gain, float32 [H].
        activation_I: root mean square of the norm's output over all tokens, float32 [H].
        grid: the quantization grid.
        exact: whether something unquantized (the router) reads the norm; scales are then powers of two, so that it
            stays exact in its storage type.
        seed: of the statistics.
        ranks: they share the MLPs.

    Returns:
        The scales with the least summed error, where the MLPs' own outputs agree that they are better than none.
    """
    ups = [weights[f"{linear}.weight"] for mlp, _ in mlps[:16] for linear in (mlp.gate, mlp.up)]
    wanted_CI = candidate_scales(activation_I, rms_of_columns(ups))
    del ups
    scales_CI = powers_of_two(wanted_CI) if exact else torch.stack([foldable_scales(s_I, norm_I) for s_I in wanted_CI])
    scales_CI[0] = 1
    ranks.broadcast(scales_CI)

    def losses(judge: tuple[Mlp, MlpInputs]) -> list[torch.Tensor]:
        mlp, inputs = judge
        moments = inputs.moments(seed)
        gate, up = (weights[f"{linear}.weight"] for linear in (mlp.gate, mlp.up))
        return [(moments.count * scale_losses(weight, scales_CI, grid, moments)).cpu() for weight in (gate, up)]

    losses_C = torch.zeros(len(scales_CI), dtype=torch.float64)
    for found in ranks.spread(losses, mlps):
        for losses_of_one_C in found:
            losses_C += losses_of_one_C
    best = int(losses_C.argmin())
    if best and not _outputs_improve(skeleton, weights, mlps[:8], scales_CI[best], grid, ranks):
        best = 0
    return ScaleChoice(scales_CI[best], float(losses_C[0]), float(losses_C[best]))


def _outputs_improve(
    skeleton: Skeleton,
    weights: Weights,
    mlps: list[tuple[Mlp, MlpInputs]],
    scales_I: torch.Tensor,
    grid: Grid,
    ranks: Ranks,
) -> bool:
    """Whether gate and up rounded under the scales bring the MLPs' outputs nearer than rounded without."""

    def errors(judge: tuple[Mlp, MlpInputs]) -> tuple[float, float]:
        mlp, inputs = judge
        original = GatedWeights.read(weights, mlp)
        inputs_RH = inputs.few()
        wanted_RH = original.output(skeleton, inputs_RH)

        def error(scales: torch.Tensor) -> float:
            gate, up = (
                fake_quantize(weight * scales, grid).div_(scales) for weight in (original.gate_WH, original.up_WH)
            )
            found_RH = GatedWeights(gate, up, original.down_HW).output(skeleton, inputs_RH)
            return float((found_RH - wanted_RH).square().double().sum())

        return error(torch.ones_like(scales_I)), error(scales_I)

    plain, under_scales = zip(*ranks.spread(errors, mlps), strict=True)
    return sum(under_scales) < sum(plain)


@dataclass(frozen=True)
class MlpResult:
    """A quantized gated MLP."""

    folded: GatedWeights
    """The weights with all scales folded in, not rounded."""
    linears: dict[str, QuantizedWeight]
    """By linear, ready for a writer."""
    moments: tuple[InputMoments, InputMoments]
    """Of the inputs of gate and up, and of down, under the scales."""
    up_scales_W: torch.Tensor
    """What up's rows are divided by and down's columns multiplied with, float32 [W]."""
    errors: MlpErrors
    weight_errors: dict[str, float]
    """By linear: the distance of the rounded weight from the folded one, over its norm."""


def quantize_mlp(
    skeleton: Skeleton,
    mlp: Mlp,
    original: GatedWeights,
    inputs: MlpInputs,
    moments: tuple[InputMoments, InputMoments],
    norm_scales_H: torch.Tensor,
    inverses: tuple[InverseFactor, ...],
    grid: Grid,
    rounding: Grid,
    steps: Collection[Step],
) -> MlpResult:
    """Quantizes gate, up and down of one MLP.

    Scales between up and down are searched and the weights rounded, as the steps say; the result is kept only where
    the MLP's own output is nearer to the original's than plain rounding under the norm's scales gets.

    Args:
        skeleton: the network.
        mlp: the MLP.
        original: its weights.
        inputs: the tokens it is judged on.
        moments: of the normed input, and of the down projection's input.
        norm_scales_H: the scales folded into the norm, [H].
        inverses: what errors of gate and up are compensated by under the norm's scales, where their layer has that.
        grid: the grid that scales are searched for.
        rounding: the grid that weights are rounded on.
        steps: of the quantization.

    Returns:
        The quantized weights and what they cost.

    Raises:
        FloatingPointError: where the MLP's outputs are not finite.
    """
    input_moments, hidden_moments = moments
    up_scales_W = search_up_scales(original, hidden_moments, grid, steps)
    folded = scaled(original, norm_scales_H, up_scales_W)
    of_input = replace(input_moments.divided(norm_scales_H), inverses=inverses)
    of_hidden = hidden_moments.divided(up_scales_W)
    linears = rounded_linears(folded, (of_input, of_hidden), rounding, steps)
    rounded = RoundedMlp(folded, linears, (of_input, of_hidden), up_scales_W)
    inputs_RH = inputs.few()
    return judged(skeleton, mlp, original, rounded, inputs_RH, inputs_RH, len(inputs.rows_R), norm_scales_H, rounding)


def rounded_linears(
    folded: GatedWeights, moments: tuple[InputMoments, InputMoments], grid: Grid, steps: Collection[Step]
) -> tuple[QuantizedWeight, QuantizedWeight, QuantizedWeight]:
    """Rounds gate, up and down as the steps say.

    Args:
        folded: the weights under their scales.
        moments: of the input, and of the down projection's input, under the same scales.
        grid: the grid that weights are rounded on.
        steps: of the quantization.

    Returns:
        Gate, up and down.
    """
    of_input, of_hidden = prepared(moments[0], grid, steps), moments[1]
    return (
        rounded_weight(folded.gate_WH, grid, of_input, steps),
        rounded_weight(folded.up_WH, grid, of_input, steps),
        rounded_weight(folded.down_HW, grid, of_hidden, steps),
    )


@dataclass(frozen=True)
class RoundedMlp:
    """What a search proposes for a gated MLP."""

    folded: GatedWeights
    """The weights with all scales folded in, not rounded."""
    linears: tuple[QuantizedWeight, ...]
    """Gate, up and down."""
    moments: tuple[InputMoments, InputMoments]
    """Of the inputs of gate and up, and of down, under the scales."""
    up_scales_W: torch.Tensor
    """What up's rows are divided by and down's columns multiplied with, float32 [W]."""


def judged(
    skeleton: Skeleton,
    mlp: Mlp,
    original: GatedWeights,
    rounded: RoundedMlp,
    original_RH: torch.Tensor,
    inputs_RH: torch.Tensor,
    num_rows: int,
    norm_scales_H: torch.Tensor,
    grid: Grid,
) -> MlpResult:
    """Keeps what a search proposes only where the MLP's output is nearer to the original's than plain rounding gets.

    Args:
        skeleton: the network.
        mlp: the MLP.
        original: its weights.
        rounded: what was searched.
        original_RH: some of what the MLP reads in the original, float32 [R, H].
        inputs_RH: what it reads once it is quantized, for the same tokens.
        num_rows: all tokens that reach it.
        norm_scales_H: the scales folded into the norm, [H].
        grid: the quantization grid.

    Returns:
        The quantized weights and what they cost.

    Raises:
        FloatingPointError: where the MLP's outputs are not finite.
    """
    folded, linears, up_scales_W = rounded.folded, rounded.linears, rounded.up_scales_W
    unscaled = scaled(original, norm_scales_H, torch.ones_like(up_scales_W))
    few_RH, name = original_RH[:PROOF_ROWS], mlp.up.rsplit(".", 1)[0]
    change = relative_change(original.output(skeleton, few_RH), folded.output(skeleton, few_RH / norm_scales_H))
    with fast_matmuls(inputs_RH.device):
        wanted_RH = original.output(skeleton, original_RH)

    def error(weights: GatedWeights, scales_H: torch.Tensor | float) -> torch.Tensor:
        with fast_matmuls(inputs_RH.device):
            found_RH = weights.output(skeleton, inputs_RH / scales_H)
        return (found_RH - wanted_RH).square().double().sum()

    figures = (
        wanted_RH.square().double().sum(),
        error(GatedWeights(*(weight.dequantize() for weight in linears)), norm_scales_H),
        error(_plainly_rounded(unscaled, grid), norm_scales_H),
        error(_plainly_rounded(original, grid), 1.0),
        change,
        *(weight.relative_error(part) for weight, part in zip(linears, folded.parts, strict=True)),
    )
    energy, searched, unsearched, untouched, changed, *weight_errors = torch.stack(figures).tolist()  # waits for a GPU
    if not math.isfinite(energy + searched + unsearched + untouched):
        raise FloatingPointError(f"{name}: outputs are not finite")
    check_same(name, changed)
    energy, plain = energy or 1.0, unsearched < searched
    if plain:
        linears = tuple(round_to_nearest(weight, grid) for weight in unscaled.parts)
        pairs = zip(linears, unscaled.parts, strict=True)
        weight_errors = [float(weight.relative_error(part)) for weight, part in pairs]
    errors = MlpErrors(
        name=name,
        error=min(searched, unsearched) / energy,
        error_plain=untouched / energy,
        energy=energy * num_rows / max(1, len(inputs_RH)),
        plain=plain,
    )
    of_input, of_hidden = rounded.moments
    return MlpResult(
        unscaled if plain else folded,
        dict(zip(mlp.linears, linears, strict=True)),
        (of_input, of_hidden.divided(1 / up_scales_W) if plain else of_hidden),
        torch.ones_like(up_scales_W) if plain else up_scales_W,
        errors,
        dict(zip(mlp.linears, weight_errors, strict=True)),
    )


def scaled(original: GatedWeights, norm_scales_H: torch.Tensor, up_scales_W: torch.Tensor) -> GatedWeights:
    """The weights with the norm's scales in gate's and up's columns, and up's rows divided for down's columns."""
    return GatedWeights(
        original.gate_WH * norm_scales_H,
        original.up_WH * norm_scales_H / up_scales_W.unsqueeze(1),
        original.down_HW * up_scales_W,
    )


def _plainly_rounded(weights: GatedWeights, grid: Grid) -> GatedWeights:
    return GatedWeights(*(fake_quantize(part, grid) for part in weights.parts))


def search_up_scales(
    original: GatedWeights, hidden_moments: InputMoments, grid: Grid, steps: Collection[Step]
) -> torch.Tensor:
    """The scales between up and down, float32 [W]: those of least output error of down; 1 without the step `scales`."""
    if "scales" not in steps:
        return torch.ones_like(hidden_moments.rms_I)
    scales_CW = candidate_scales(hidden_moments.rms_I, rms_of_columns([original.down_HW]))
    losses_C = scale_losses(original.down_HW, scales_CW, grid, hidden_moments)
    return scales_CW[losses_C.argmin().unsqueeze(0)].squeeze(0)  # a number would have to come from the GPU


def prove_same(what: str, wanted: torch.Tensor, found: torch.Tensor) -> None:
    """Checks that folding scales has not changed a function; this guards against our own bugs.

    Args:
        what: name of the module, for the message.
        wanted: its output before.
        found: its output after, on the same input.

    Raises:
        FloatingPointError: where the outputs are not finite.
    """
    check_same(what, float(relative_change(wanted, found)))


def relative_change(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The distance of two outputs over the norm of the first, float64 []."""
    return (found - wanted).norm().double() / wanted.norm().clamp(min=1e-30)


def check_same(what: str, change: float) -> None:
    """Checks that folding scales has not changed a function; this guards against our own bugs.

    Args:
        what: name of the module, for the message.
        change: the `relative_change` of its output.

    Raises:
        FloatingPointError: where the outputs are not finite.
    """
    if not math.isfinite(change):
        raise FloatingPointError(f"{what}: outputs are not finite")
    assert change < 1e-3, f"{what}: folding the scales changed its output by {change:.2e}; please report this"
