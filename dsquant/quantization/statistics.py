"""Sums what quantization needs to know of a linear's inputs over the tokens that reach it.

Shape legend: R tokens, I in features, O out features, G blocks of B channels, K rows of the factor, P parts of W
channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsquant.kernels.losses import gram_losses
from dsquant.kernels.products import add_product, apply_linear
from dsquant.source.weights import CPU

# Up to this many tokens are kept as they are; of more, this many random combinations.
FACTOR_ROWS = 1024
# Inputs up to this width are kept as their Gram matrix; of wider ones that would cost more than the factor does.
WIDEST_GRAM = 2048
# Where errors will be compensated, wider inputs keep the Gram matrices of equal parts of at most this width.
WIDEST_PART = 8192
# A GPU has work for all its cores only where this many weights pass together.
GPU_ELEMENTS_AT_ONCE = 2**25
# Gram matrices of neighbouring channels are kept in blocks of this many, the largest group size.
BLOCK = 128


@dataclass(frozen=True)
class Importance:
    """What a format may want to know of a linear's inputs: the importance of each channel, sums of squares over the
    tokens that reach the linear, and the largest of all."""

    squares_I: torch.Tensor
    """float32 [I], or [H, N] for the keys of MLA."""
    count: int
    """Tokens behind the sums."""
    largest: torch.Tensor | None = None
    """float32 []: the largest magnitude; None where it was not looked for."""


class InputStatistics:
    """Sums over the inputs of a linear; the cost of every later loss is independent of the number of tokens."""

    def __init__(
        self,
        num_features: int,
        seed: int,
        device: torch.device = CPU,
        widest_gram: int | None = None,
        compensated: bool = False,
    ) -> None:
        """Starts with no tokens; the seed is of the random signs that combine tokens.

        Inputs up to `widest_gram` (None: `WIDEST_GRAM`) are kept as their Gram matrix; of wider ones the parts' are
        kept where errors will be `compensated`.
        """
        self.count = 0
        self._largest_I = torch.zeros(num_features, device=device)
        self._block = BLOCK if num_features % BLOCK == 0 else num_features
        self._blocks_GBB = torch.zeros(num_features // self._block, self._block, self._block, device=device)
        wide = is_wide(num_features) if widest_gram is None else num_features > widest_gram
        self._gram_II = None if wide else torch.zeros(num_features, num_features, device=device)
        width = part_width(num_features)
        parts = num_features // width if wide and compensated else 0
        self._parts_PWW = torch.zeros(parts, width, width, device=device) if parts else None
        self._factor_KI = torch.zeros(0, num_features, device=device)
        self._generator = torch.Generator(device).manual_seed(seed)

    def add(self, inputs_RI: torch.Tensor, weights_R: torch.Tensor | None = None) -> None:
        """Takes more tokens into the sums: their inputs, float32 [R, I], and what multiplies each token's, [R], but for
        their largest magnitude."""
        if len(inputs_RI):
            for extreme_I in (inputs_RI.amax(0), -inputs_RI.amin(0)):
                torch.maximum(self._largest_I, extreme_I, out=self._largest_I)
        if weights_R is not None:
            inputs_RI = inputs_RI * weights_R.unsqueeze(1)
        if self._gram_II is not None:
            add_product(self._gram_II, inputs_RI.T, inputs_RI)
        else:
            inputs_GRB = inputs_RI.unflatten(1, (-1, self._block)).transpose(0, 1)
            self._blocks_GBB.baddbmm_(inputs_GRB.transpose(1, 2), inputs_GRB)
            self._add_to_factor(inputs_RI)
        if self._parts_PWW is not None:
            for part_WW, inputs_RW in zip(self._parts_PWW, inputs_RI.chunk(len(self._parts_PWW), 1), strict=True):
                add_product(part_WW, inputs_RW.T, inputs_RW)
        self.count += len(inputs_RI)

    def merge(self, other: "InputStatistics") -> None:
        """Takes another's sums into these, as if its tokens came now."""
        torch.maximum(self._largest_I, other._largest_I, out=self._largest_I)
        if self._gram_II is not None and other._gram_II is not None:
            self._gram_II += other._gram_II
        else:
            self._blocks_GBB += other._blocks_GBB
            if other.count <= FACTOR_ROWS:
                self._add_to_factor(other._factor_KI)
            else:
                if self.count <= FACTOR_ROWS:
                    self._factor_KI = self._combined(self._factor_KI)
                self._factor_KI += other._factor_KI
        if self._parts_PWW is not None and other._parts_PWW is not None:
            self._parts_PWW += other._parts_PWW
        self.count += other.count

    def travel(self, count: int, carry: Callable[[torch.Tensor], None]) -> None:
        """Lets the sums over `count` tokens pass between processes, which all call this.

        `carry` is called with each tensor; the receivers' are overwritten.
        """
        if self.count != count:  # here they arrive
            self.count = count
            self._factor_KI = self._factor_KI.new_zeros(min(count, FACTOR_ROWS), self._factor_KI.shape[1])
        carry(self._largest_I)
        if self._gram_II is not None:
            carry(self._gram_II)
        else:
            carry(self._blocks_GBB)
            carry(self._factor_KI)
        if self._parts_PWW is not None:
            carry(self._parts_PWW)

    def _add_to_factor(self, inputs_RI: torch.Tensor) -> None:
        if self.count + len(inputs_RI) <= FACTOR_ROWS:
            self._factor_KI = torch.cat([self._factor_KI, inputs_RI])
            return
        if self.count <= FACTOR_ROWS:  # from here on the rows are combinations of tokens
            self._factor_KI = self._combined(self._factor_KI)
        self._factor_KI += self._combined(inputs_RI)

    def _combined(self, inputs_RI: torch.Tensor) -> torch.Tensor:
        # Random signs S: E[(S x)^T (S x)] = x^T x, so ||dW (S x)^T||^2 estimates the loss without bias.
        shape = (FACTOR_ROWS, len(inputs_RI))
        signs_KR = torch.randint(0, 2, shape, generator=self._generator, device=inputs_RI.device)
        return apply_linear(signs_KR.float().mul_(2).sub_(1), inputs_RI.T).mul_(FACTOR_ROWS**-0.5)

    def moments(self) -> "InputMoments":
        """Returns the means over all tokens added so far; all zero where there were none."""
        count, largest_I = max(self.count, 1), self._largest_I.clone()
        if self._gram_II is None:
            parts_PWW = None if self._parts_PWW is None else self._parts_PWW / count
            blocks_GBB, factor_KI = self._blocks_GBB / count, self._factor_KI / count**0.5
            return InputMoments(self.count, largest_I, blocks_GBB, None, factor_KI, parts_PWW)
        gram_II = self._gram_II / count
        blocks = gram_II.unflatten(1, (-1, self._block)).unflatten(0, (-1, self._block))
        blocks_GBB = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
        return InputMoments(self.count, largest_I, blocks_GBB, gram_II, None)


def is_wide(num_features: int) -> bool:
    """Returns whether inputs are too wide for a Gram matrix of each linear's own."""
    return num_features > WIDEST_GRAM


def part_width(num_features: int) -> int:
    """Returns the width of the widest equal parts of inputs: at most `WIDEST_PART`, and whole blocks."""
    if num_features <= WIDEST_PART or num_features % BLOCK:
        return num_features
    blocks = num_features // BLOCK
    return BLOCK * max(width for width in range(1, WIDEST_PART // BLOCK + 1) if blocks % width == 0)


@dataclass(frozen=True)
class InverseFactor:
    """Compensates the error of a column in those that are rounded later (`compensate`)."""

    order_I: torch.Tensor
    """int64 [I]: the columns in the order of rounding."""
    factor_II: torch.Tensor
    """float32 [I, I], upper triangular U: U^T U is the inverse of the damped Gram matrix in that order."""


@dataclass(frozen=True)
class InputMoments:
    """Second moments of a linear's inputs, each the mean over tokens, and how large the inputs become."""

    count: int
    """Tokens behind the means."""
    largest_I: torch.Tensor
    """float32 [I]: the largest magnitude of each channel; 0 without tokens."""
    blocks_GBB: torch.Tensor
    """float32 [G, B, B]: the diagonal blocks of the Gram matrix, the mean of x^T x."""
    gram_II: torch.Tensor | None
    """float32 [I, I], the Gram matrix; None where the inputs are wide."""
    factor_KI: torch.Tensor | None
    """float32 [K, I] where the inputs are wide: factor^T factor is the Gram matrix, or estimates it without bias."""
    parts_PWW: torch.Tensor | None = None
    """float32 [P, W, W] where wide inputs' errors will be compensated: the Gram matrices of P equal parts of them."""
    inverses: tuple[InverseFactor, ...] = ()
    """Compensate errors, one for each part of the inputs; empty where they have not been computed yet."""

    @property
    def rms_I(self) -> torch.Tensor:
        """Root mean square of each input channel, float32 [I]."""
        return self.blocks_GBB.diagonal(dim1=1, dim2=2).flatten().clamp(min=0).sqrt()

    @property
    def importance(self) -> Importance:
        """The diagonal alone, and the largest of all channels."""
        return Importance(self.rms_I.square() * self.count, self.count, self.largest_I.max())

    def divided(self, scales_I: torch.Tensor) -> "InputMoments":
        """Returns the moments of inputs whose channels are divided by `scales_I`, without `inverses`."""
        scales_GB = scales_I.view(self.blocks_GBB.shape[0], -1)
        return InputMoments(
            self.count,
            self.largest_I / scales_I,
            self.blocks_GBB / scales_GB.unsqueeze(1) / scales_GB.unsqueeze(2),
            None if self.gram_II is None else self.gram_II / scales_I / scales_I.unsqueeze(1),
            None if self.factor_KI is None else self.factor_KI / scales_I,
            None if self.parts_PWW is None else _divided_parts(self.parts_PWW, scales_I),
        )

    def loss_O(self, difference_OI: torch.Tensor) -> torch.Tensor:
        """Returns the mean squared output error that a weight difference dW [O, I] causes, by output row, float32 [O].

        The row sums of (dW H) * dW, whose total is tr(dW H dW^T) with H the Gram matrix; with a factor F of H, those of
        (dW F^T)^2.
        """
        if self.factor_KI is not None:
            return (difference_OI @ self.factor_KI.T).square_().sum(1)
        assert self.gram_II is not None
        return gram_losses(difference_OI, self.gram_II).clamp_(min=0)

    def loss(self, difference: torch.Tensor) -> torch.Tensor:
        """Returns the sum of `loss_O` over all rows: float64 [] for a difference [O, I], [C] for several [C, O, I]."""
        return self.loss_O(difference.flatten(0, -2)).double().view(difference.shape[:-1]).sum(-1)

    def group_grams_GSS(self, group_size: int) -> torch.Tensor:
        """Returns the diagonal blocks of the Gram matrix, one for each quantization group, float32 [G, S, S]."""
        per_block = self.blocks_GBB.shape[1] // group_size
        parts = self.blocks_GBB.unflatten(2, (per_block, group_size)).unflatten(1, (per_block, group_size))
        return parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)


def _divided_parts(parts_PWW: torch.Tensor, scales_I: torch.Tensor) -> torch.Tensor:
    scales_PW = scales_I.view(len(parts_PWW), -1)
    return (parts_PWW / scales_PW.unsqueeze(1)).div_(scales_PW.unsqueeze(2))
