"""Quantizes a gated MLP: the dense one, the shared expert or a routed expert.

Shape legend: R tokens, H hidden size, W width of the MLP.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from dsquant.kernels.precision import fast_matmuls
from dsquant.model.gated import GatedWeights
from dsquant.model.structure import Mlp
from dsquant.presets import Step
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.mlp_inputs import MlpInputs
from dsquant.quantization.scale import best_scales, candidate_scales, is_kept, rms_of_columns
from dsquant.quantization.statistics import InputMoments
from dsquant.quantization.steps import prepared, rounded_weight, rounded_weights
from dsquant.schemes import QuantizedWeight, Scheme, fitted_together, round_to_nearest

# Whether folding has changed the function is checked on these.
PROOF_ROWS = 64


@dataclass(frozen=True)
class LoadedMlp:
    """A gated MLP that is in memory."""

    mlp: Mlp
    original: GatedWeights
    inputs: MlpInputs
    """The tokens it is judged on, as it reads them: in the original, or with step `follow` in the quantized model."""
    seed: int
    """Of its statistics."""
    behind: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Gives for rows, int64 [R], the hidden states behind the MLP in the original less those that its outputs are added
    to in the quantized model, float32 [R, H]; of an MLP that reads all tokens, where these aim at the others."""

    def lack(self, rows_R: torch.Tensor, hidden_RW: torch.Tensor) -> torch.Tensor | None:
        """Returns by how much hidden states differ, less the original's outputs for what its down reads: float32
        [R, H]."""
        if self.behind is None:
            return None
        return self.behind(rows_R) - self.original.output_of(hidden_RW)


@dataclass(frozen=True)
class MlpErrors:
    """The cost of quantizing a gated MLP."""

    name: str
    error: float
    """Squared output error, relative to the output; tokens count as in the statistics."""
    error_plain: float
    """The same under plain rounding, with no scales."""
    energy: float
    """Summed squared output, estimated over all tokens that reach it."""
    plain: bool
    """Whether scales and clip of this MLP were given up because they did not lower the error, its own or that of the
    hidden states behind it."""


@dataclass(frozen=True)
class RoundedMlp:
    """A gated MLP's weights, scaled and rounded."""

    folded: GatedWeights
    """With all scales folded in, not rounded."""
    linears: tuple[QuantizedWeight, ...]
    """Gate, up and down."""
    moments: tuple[InputMoments, InputMoments]
    """Of the inputs of gate and up, and of down, under the scales."""
    up_scales_W: torch.Tensor
    """Divide up's rows and multiply down's columns, float32 [W]."""


@dataclass(frozen=True)
class MlpFigures:
    """What quantizing a gated MLP cost, where it was computed: a GPU is not waited for until it is `told`."""

    mlp: Mlp
    numbers: torch.Tensor
    """float64 [9]: the summed squared output of few tokens, and its error as proposed, under plain rounding with the
    norm's scales, and with none; 1 where the proposal is kept; the relative change of the folded, unrounded MLP; the
    relative errors of weights."""
    tokens_of_each: float
    """Tokens that reach the MLP, over those that were looked at."""

    def told(self) -> tuple[MlpErrors, dict[str, float]]:
        """Waits for the numbers; returns the MLP's errors, and each linear's distance from the folded weight, over its
        norm.

        Raises FloatingPointError where the MLP's outputs are not finite.
        """
        energy, searched, unsearched, untouched, kept, changed, *of_weights = self.numbers.tolist()
        name = self.mlp.up.rsplit(".", 1)[0]
        if not math.isfinite(energy + searched + unsearched + untouched):
            raise FloatingPointError(f"{name}: outputs are not finite")
        check_same(name, changed)
        energy = energy or 1.0
        errors = MlpErrors(
            name=name,
            error=(searched if kept else unsearched) / energy,
            error_plain=untouched / energy,
            energy=energy * self.tokens_of_each,
            plain=not kept,
        )
        return errors, dict(zip(self.mlp.linears, of_weights, strict=True))


@dataclass(frozen=True)
class MlpResult:
    """A quantized gated MLP."""

    rounded: RoundedMlp
    figures: MlpFigures


def quantize_mlp(
    job: LayerJob,
    loaded: LoadedMlp,
    moments: tuple[InputMoments, InputMoments],
    norm_scales_H: torch.Tensor,
    grid: Scheme,
) -> MlpResult:
    """Quantizes gate, up and down of one MLP: searches the scales between up and down and rounds, as the steps say.

    `moments` are those of its input under the norm's scales, and of the down projection's input; scales are searched
    for `grid`.
    """
    (of_input, of_hidden), schemes = moments, _schemes(job, grid, loaded.mlp)
    up_scales_W = search_up_scales(loaded.original, of_hidden, grid, job.steps)
    folded, of_hidden = scaled(loaded.original, norm_scales_H, up_scales_W), of_hidden.divided(up_scales_W)
    of_gate, fitted = prepared(of_input, schemes[:2], job.steps), _fitted(schemes, folded)
    linears = (
        *rounded_weights([folded.gate_WH, folded.up_WH], fitted[:2], of_gate, job.steps),
        rounded_weight(folded.down_HW, fitted[2], of_hidden, job.steps),
    )
    return judged(job, loaded, RoundedMlp(folded, linears, (of_input, of_hidden), up_scales_W), norm_scales_H, grid)


def _schemes(job: LayerJob, grid: Scheme, mlp: Mlp) -> list[Scheme]:
    """Of gate, up and down."""
    return [job.grid_of(grid, linear) for linear in mlp.linears]


def _fitted(schemes: Sequence[Scheme], weights: GatedWeights) -> list[Scheme]:
    """Gate and up share what their weights decide."""
    gate, up, down = weights.parts
    return [*fitted_together(schemes[:2], [gate, up]), schemes[2].fitted(down)]


def judged(
    job: LayerJob, loaded: LoadedMlp, proposed: RoundedMlp, norm_scales_H: torch.Tensor, grid: Scheme
) -> MlpResult:
    """Keeps the proposal, or plain rounding where this brings the MLP's output nearer to the original's, or the hidden
    states behind it where it makes up for what they lack."""
    original, inputs = loaded.original, loaded.inputs
    inputs_RH = inputs.few()
    original_RH = inputs_RH if inputs.activations is job.mlp_inputs else inputs.of(job.mlp_inputs).few()
    unscaled = scaled(original, norm_scales_H, torch.ones_like(proposed.up_scales_W))
    schemes = _schemes(job, grid, loaded.mlp)
    plain = _plainly_rounded(unscaled, schemes)

    few_RH = original_RH[:PROOF_ROWS]
    same_RH = proposed.folded.output(job.skeleton, few_RH / norm_scales_H)
    change = relative_change(original.output(job.skeleton, few_RH), same_RH)
    with fast_matmuls(inputs_RH.device):
        hidden_RW = original.hidden(job.skeleton, original_RH)
        wanted_RH, lack_RH = original.output_of(hidden_RW), loaded.lack(inputs.rows_of_few, hidden_RW)

    def errors(linears: Sequence[QuantizedWeight], scales_H: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        weights = GatedWeights(*(weight.dequantize() for weight in linears))
        with fast_matmuls(inputs_RH.device):
            found_RH = weights.output(job.skeleton, inputs_RH / scales_H)
        missed_RH = found_RH - wanted_RH
        own = inputs.energy_of_few(missed_RH)
        return own, own if lack_RH is None else inputs.energy_of_few(missed_RH - lack_RH)

    (searched, behind), (unsearched, behind_plain) = (errors(part, norm_scales_H) for part in (proposed.linears, plain))
    untouched, _ = errors(_plainly_rounded(original, schemes), 1.0)
    kept = is_kept(behind, behind_plain)
    chosen = _chosen(kept, proposed, unscaled, plain)
    of_weights = [part.relative_error(folded) for part, folded in zip(chosen.linears, chosen.folded.parts, strict=True)]
    costs = (inputs.energy_of_few(wanted_RH), searched, unsearched, untouched, kept.double(), change)
    figures = MlpFigures(loaded.mlp, torch.stack((*costs, *of_weights)), len(inputs.rows_R) / max(1, len(inputs_RH)))
    return MlpResult(chosen, figures)


def _chosen(
    kept: torch.Tensor, proposed: RoundedMlp, unscaled: GatedWeights, plain: Sequence[QuantizedWeight]
) -> RoundedMlp:
    """The proposal where `kept`, bool [], is true; else the MLP under the norm's scales alone, plainly rounded."""
    (of_input, of_hidden), scales_W = proposed.moments, proposed.up_scales_W
    parts = zip(proposed.folded.parts, unscaled.parts, strict=True)
    return RoundedMlp(
        GatedWeights(*(torch.where(kept, own, other) for own, other in parts)),
        tuple(_either(kept, own, other) for own, other in zip(proposed.linears, plain, strict=True)),
        (of_input, of_hidden.divided(torch.where(kept, 1.0, 1 / scales_W))),
        torch.where(kept, scales_W, 1.0),
    )


def _either(kept: torch.Tensor, own: QuantizedWeight, other: QuantizedWeight) -> QuantizedWeight:
    """A GPU chooses itself, but where schemes were fitted to their weights, and so differ."""
    if own.grid != other.grid:
        return own if bool(kept) else other
    return own.or_else(other, kept.expand(len(own.codes_OI)))


def scaled(original: GatedWeights, norm_scales_H: torch.Tensor, up_scales_W: torch.Tensor) -> GatedWeights:
    """Returns the weights under the norm's scales and their own: the MLP's part of a `Fold`, for weights in memory.

    Columns are multiplied before rows are divided, the other way round than in `Fold.apply`, which a delta takes: the
    last bit of a weight can differ.
    """
    return GatedWeights(
        original.gate_WH * norm_scales_H,
        original.up_WH * norm_scales_H / up_scales_W.unsqueeze(1),
        original.down_HW * up_scales_W,
    )


def _plainly_rounded(weights: GatedWeights, schemes: Sequence[Scheme]) -> list[QuantizedWeight]:
    fitted = _fitted(schemes, weights)
    return [round_to_nearest(part, own) for part, own in zip(weights.parts, fitted, strict=True)]


def search_up_scales(
    original: GatedWeights, hidden_moments: InputMoments, grid: Scheme, steps: Collection[Step]
) -> torch.Tensor:
    """Returns the scales between up and down, float32 [W]: those of least output error of down; 1 without `scales`."""
    if "scales" not in steps:
        return torch.ones_like(hidden_moments.rms_I)
    scales_CW = candidate_scales(hidden_moments.rms_I, rms_of_columns([original.down_HW]))
    return best_scales(scales_CW, [lambda: ([original.down_HW], hidden_moments)], grid)


def prove_same(what: str, wanted: torch.Tensor, found: torch.Tensor) -> None:
    """Checks that folding scales has not changed the function of a module; this guards against our own bugs.

    Raises FloatingPointError where the outputs are not finite.
    """
    check_same(what, float(relative_change(wanted, found)))


def relative_change(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Returns the distance of two outputs over the norm of the first, float64 []."""
    return (found - wanted).norm().double() / wanted.norm().clamp(min=1e-30)


def check_same(what: str, change: float) -> None:
    """Checks by the `relative_change` of a module's output that folding scales has not changed its function.

    Raises FloatingPointError where the outputs are not finite.
    """
    if not math.isfinite(change):
        raise FloatingPointError(f"{what}: outputs are not finite")
    assert change < 1e-3, f"{what}: folding the scales changed its output by {change:.2e}; please report this"
