"""What quantization needs to know of a linear's inputs: their Gram matrix, summed over the tokens that reach it.

Shape legend: R tokens, I in features, O out features, S rows of the sketch.
"""

from dataclasses import dataclass

import torch

# Inputs wider than this are searched on a sketch: a loss then costs O*I*S instead of O*I*I operations.
SKETCH_ROWS = 1024


class InputStatistics:
    """Sums over the inputs of a linear; the cost of every later loss is independent of the number of tokens."""

    def __init__(self, num_features: int, seed: int) -> None:
        """Starts with no tokens.

        Args:
            num_features: I.
            seed: of the sketch's random signs.
        """
        self.count = 0
        self.gram_II = torch.zeros(num_features, num_features)
        self._sketch_SI = torch.zeros(SKETCH_ROWS, num_features) if num_features > SKETCH_ROWS else None
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, inputs_RI: torch.Tensor) -> None:
        """Takes more tokens' inputs into the sums, float32 [R, I]."""
        self.count += len(inputs_RI)
        self.gram_II.addmm_(inputs_RI.T, inputs_RI)
        if self._sketch_SI is not None:
            # Random signs S: E[(S x)^T (S x)] = x^T x, so ||dW (S x)^T||^2 estimates the loss without bias.
            signs_SR = torch.randint(0, 2, (SKETCH_ROWS, len(inputs_RI)), generator=self._generator)
            self._sketch_SI.addmm_(signs_SR.float().mul_(2).sub_(1), inputs_RI, alpha=SKETCH_ROWS**-0.5)

    def moments(self) -> "InputMoments":
        """The means over all tokens added so far; all zero where there were none."""
        count = max(self.count, 1)
        sketch_SI = None if self._sketch_SI is None else self._sketch_SI / count**0.5
        return InputMoments(self.count, self.gram_II / count, sketch_SI)


@dataclass(frozen=True)
class InputMoments:
    """Second moments of a linear's inputs, each the mean over tokens."""

    count: int
    """Tokens behind the means."""
    gram_II: torch.Tensor
    """float32 [I, I]: mean of x^T x."""
    sketch_SI: torch.Tensor | None
    """float32 [S, I] with E[sketch^T sketch] = gram; None where the Gram matrix itself is cheap."""

    @property
    def rms_I(self) -> torch.Tensor:
        """Root mean square of each input channel, float32 [I]."""
        return self.gram_II.diagonal().clamp(min=0).sqrt()

    def divided(self, scales_I: torch.Tensor) -> "InputMoments":
        """The moments of inputs whose channels are divided by `scales_I`."""
        sketch_SI = None if self.sketch_SI is None else self.sketch_SI / scales_I
        return InputMoments(self.count, self.gram_II / scales_I / scales_I.unsqueeze(1), sketch_SI)

    def loss_O(self, difference_OI: torch.Tensor) -> torch.Tensor:
        """Mean squared output error that a weight difference causes, by output row.

        The row sums of (dW H) * dW, whose total is tr(dW H dW^T); on the sketch, ||dW sketch^T||^2.

        Args:
            difference_OI: dW, float32 [O, I].

        Returns:
            float32 [O].
        """
        if self.sketch_SI is not None:
            return (difference_OI @ self.sketch_SI.T).square_().sum(1)
        return (difference_OI @ self.gram_II).mul_(difference_OI).sum(1).clamp_(min=0)

    def loss(self, difference_OI: torch.Tensor) -> float:
        """The sum of `loss_O` over all rows, in float64."""
        return float(self.loss_O(difference_OI).double().sum())

    def group_grams_GSS(self, group_size: int) -> torch.Tensor:
        """The diagonal blocks of the Gram matrix, one for each quantization group, float32 [G, S, S]."""
        blocks = self.gram_II.unflatten(1, (-1, group_size)).unflatten(0, (-1, group_size))
        return torch.stack([blocks[group, :, group] for group in range(blocks.shape[0])])
