"""Fits a weight to its inputs in the quantized model, so that it puts out what the original did.

In the quantized model a linear reads x~, where it read x in the original. The weight whose outputs on x~ are nearest
to W x has a closed form, W E[x x~^T] E[x~ x~^T]^-1 = W + W E[(x - x~) x~^T] E[x~ x~^T]^-1 (asymmetric calibration:
GPTAQ, arXiv 2504.02692). That weight is rounded, on the moments of x~.

Where outputs are added to hidden states that are h~ instead of h, W x + (h - h~) is what they should be: W then becomes
W + (W E[(x - x~) x~^T] + E[(h - h~) x~^T]) E[x~ x~^T]^-1 (docs/decisions/0051).

Shape legend: R tokens, I in features, O out features.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dsquant.kernels.precision import fast_matmuls
from dsquant.kernels.products import add_product, apply_linear
from dsquant.presets import Step
from dsquant.quantization.compensate import damped
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.rows_together import rounded_together
from dsquant.quantization.statistics import InputMoments, InputStatistics, is_wide
from dsquant.quantization.steps import prepared, rounded_weight, rounded_weights
from dsquant.schemes import QuantizedWeight, Scheme, fitted_together
from dsquant.source.weights import CPU

# Inputs up to this width are kept as whole matrices here, which takes R1's hidden states (7168).
WIDEST_PAIRS = 8192
# The Gram matrix's diagonal is raised by this share of its mean, for each feature over a token, before weights are
# fitted to the drift: of few tokens the drift is mostly noise (docs/decisions/0015).
DRIFT_DAMPING = 3.0
# Of wide inputs tokens are kept instead of their sums where so many times the tokens are at most the channels.
FEW_TOKENS = 2


def makes_up(job: LayerJob, grid: Scheme, linear: str) -> bool:
    """Returns whether a linear whose outputs are added to hidden states is fitted to what these lack."""
    rounded = linear in job.linears[grid] and job.rounds(grid, linear)
    return rounded and job.weights.shape(f"{linear}.weight")[1] <= WIDEST_PAIRS


@dataclass(frozen=True)
class PairMoments:
    """Second moments of a linear's inputs in two models, each the mean over tokens."""

    moments: InputMoments
    """Of x~, the quantized model's inputs."""
    drift_II: torch.Tensor | None
    """float32 [I, I], the mean of (x - x~)^T x~; None where the inputs are too wide, or tokens are kept."""
    tokens: tuple[torch.Tensor, torch.Tensor] | None = None
    """x - x~ and x~, float32 [R, I], of tokens that are far fewer than channels."""
    lack_OI: torch.Tensor | None = None
    """float32 [O, I], the mean of (h - h~)^T x~; None where outputs are not added to hidden states."""

    def divided(self, scales_I: torch.Tensor) -> "PairMoments":
        """Returns the moments of inputs whose channels are divided by `scales_I` in both models."""
        drift_II = None if self.drift_II is None else self.drift_II / scales_I / scales_I.unsqueeze(1)
        tokens = None if self.tokens is None else (self.tokens[0] / scales_I, self.tokens[1] / scales_I)
        lack_OI = None if self.lack_OI is None else self.lack_OI / scales_I
        return PairMoments(self.moments.divided(scales_I), drift_II, tokens, lack_OI)

    def fitted(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """Returns W + (W C + L) (H + damping)^-1 with C the drift, L the lack and H the Gram matrix, float32 [O, I].

        W itself where there is no whole Gram matrix or no token.
        """
        if self.tokens is not None:
            return weight_OI + self._change_by_tokens(weight_OI, *self.tokens)
        gram_II = self.moments.gram_II
        if gram_II is None or self.drift_II is None or not self.moments.count:
            return weight_OI
        damped_II = damped(gram_II.double(), DRIFT_DAMPING * len(gram_II) / self.moments.count)
        factor_II, problem = torch.linalg.cholesky_ex(damped_II)
        with fast_matmuls(weight_OI.device):
            if self.lack_OI is not None:
                change_OI = _solved(apply_linear(weight_OI, self.drift_II.T) + self.lack_OI, factor_II)
            elif len(weight_OI) < len(gram_II):  # the fewer right-hand sides to solve for
                change_OI = _solved(apply_linear(weight_OI, self.drift_II.T), factor_II)
            else:
                change_OI = apply_linear(weight_OI, _solved(self.drift_II, factor_II).T)
        return weight_OI + torch.where(problem == 0, change_OI, 0.0)

    def _change_by_tokens(
        self, weight_OI: torch.Tensor, drift_RI: torch.Tensor, inputs_RI: torch.Tensor
    ) -> torch.Tensor:
        """W D^T (X~ X~^T + damping)^-1 X~, with the damping that the Gram matrix would get: they have one trace."""
        with fast_matmuls(weight_OI.device):
            gram_RR = damped(apply_linear(inputs_RI, inputs_RI).double(), DRIFT_DAMPING)
            factor_RR, problem = torch.linalg.cholesky_ex(gram_RR)
            change_OI = apply_linear(_solved(apply_linear(weight_OI, drift_RI), factor_RR), inputs_RI.T)
        return torch.where(problem == 0, change_OI, 0.0)

    def rounded(
        self,
        weights: Sequence[torch.Tensor],
        grids: Sequence[Scheme],
        steps: Collection[Step],
        metrics: Sequence[torch.Tensor | None] = (),
    ) -> list[QuantizedWeight]:
        """Fits weights that read this input to it and rounds them, each float32 [O, I] with its own O, on its grid.

        With inputs wider than `WIDEST_PAIRS` they are not fitted, and compensated in parts; nor are those that their
        format rounds, which gets them as they are. The rows of those that have a metric, float32 [O, O], are rounded
        together for what they do to predictions (`rows_together`).
        """
        fitted = self.fitted(torch.cat(list(weights))).split([len(weight_OI) for weight_OI in weights])
        wanted = [new if grid.rounded else old for new, old, grid in zip(fitted, weights, grids, strict=True)]
        grids = fitted_together(grids, wanted)
        known = {place: metric_OO for place, metric_OO in enumerate(metrics) if metric_OO is not None}
        found: dict[int, QuantizedWeight] = {}
        for grid in dict.fromkeys(grids):
            places = [place for place, own in enumerate(grids) if own == grid]
            together = [place for place in places if place in known]
            moments = prepared(self.moments, [grid], steps) if together else self.moments
            for place in together:
                rounded = partial(rounded_weight, grid=grid, moments=moments, steps=steps)
                found[place] = rounded_together(wanted[place], known[place], rounded)
            if rest := [place for place in places if place not in known]:
                parts = rounded_weights([wanted[place] for place in rest], [grid] * len(rest), moments, steps)
                found.update(zip(rest, parts, strict=True))
        return [found[place] for place in range(len(weights))]


def _solved(sides_RI: torch.Tensor, factor_II: torch.Tensor) -> torch.Tensor:
    """Solves X H = sides with H = factor factor^T in float64; X is float32."""
    return torch.cholesky_solve(sides_RI.double().T, factor_II).T.float()


class PairStatistics:
    """Sums over the inputs of a linear in the original and in the quantized model."""

    def __init__(self, num_features: int, seed: int, device: torch.device = CPU, num_tokens: int | None = None) -> None:
        """Starts with no tokens; the seed is of the random signs that combine tokens of wide inputs.

        `num_tokens` is how many will come at most, None where that is not known.
        """
        self._statistics = InputStatistics(num_features, seed, device, WIDEST_PAIRS, compensated=True)
        whole = num_features <= WIDEST_PAIRS
        few = whole and is_wide(num_features) and num_tokens is not None and FEW_TOKENS * num_tokens <= num_features
        self._drift_II = torch.zeros(num_features, num_features, device=device) if whole and not few else None
        self._tokens: list[tuple[torch.Tensor, torch.Tensor]] | None = [] if few else None
        self._lack_OI: torch.Tensor | None = None

    def add(
        self,
        original_RI: torch.Tensor,
        quantized_RI: torch.Tensor,
        weights_R: torch.Tensor | None = None,
        lack_RO: torch.Tensor | None = None,
    ) -> None:
        """Adds x and x~ of the same tokens, float32 [R, I], each multiplied by its weight.

        `lack_RO` is h - h~, float32, of the hidden states that the outputs are added to.
        """
        self._statistics.add(quantized_RI, weights_R)
        if self._drift_II is None and self._tokens is None:
            return
        if weights_R is not None:
            original_RI, quantized_RI = (part * weights_R.unsqueeze(1) for part in (original_RI, quantized_RI))
            lack_RO = None if lack_RO is None else lack_RO * weights_R.unsqueeze(1)
        if self._tokens is not None:
            self._tokens.append((original_RI - quantized_RI, quantized_RI))
        elif self._drift_II is not None:
            add_product(self._drift_II, (original_RI - quantized_RI).T, quantized_RI)
            if lack_RO is not None:
                if self._lack_OI is None:
                    self._lack_OI = lack_RO.new_zeros(lack_RO.shape[1], quantized_RI.shape[1])
                add_product(self._lack_OI, lack_RO.T, quantized_RI)

    def moments(self) -> PairMoments:
        """Returns the means over all tokens added so far."""
        count, moments = max(self._statistics.count, 1), self._statistics.moments()
        if self._tokens:
            drift_RI, inputs_RI = (torch.cat(parts) for parts in zip(*self._tokens, strict=True))
            return PairMoments(moments, None, (drift_RI, inputs_RI))
        drift_II, lack_OI = (None if part is None else part / count for part in (self._drift_II, self._lack_OI))
        return PairMoments(moments, drift_II, lack_OI=lack_OI)
