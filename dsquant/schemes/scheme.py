"""The interface of schemes.

Shape legend: C candidates, O out features, I in features, B blocks along I.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch

from dsquant.kernels import grids
from dsquant.kernels.compensation import compensate_group
from dsquant.kernels.values import CompensatedBlocks, Levels, Parameters


class Scheme(ABC):
    """The numbers that a group of weights may hold: the parameters of its blocks, and the levels of their codes.

    Schemes are hashable values. One scale serves a block; the parameters of a group's blocks are chosen together, since
    a format may store scales themselves with few bits.
    """

    @property
    @abstractmethod
    def group_size(self) -> int:
        """Columns of a group."""

    @property
    def block_size(self) -> int:
        """Columns of a block, a power of two of at least 16 that divides a group."""
        return self.group_size

    @property
    @abstractmethod
    def levels(self) -> Levels:
        """The values of codes."""

    @property
    def units(self) -> tuple[int, ...]:
        """Numbers of columns that stay together while columns are sorted, ascending: at least blocks and groups."""
        return self.block_size, self.group_size

    @property
    def vector_size(self) -> int:
        """Neighbouring columns that keep their order while columns are sorted: one code may stand for them all."""
        return 1

    @property
    def single(self) -> bool:
        """Whether each weight has a code of its own, which may change alone."""
        return True

    @property
    def rounded(self) -> bool:
        """Whether weights are rounded to it; else they go on as they are, to a format that rounds itself."""
        return True

    @property
    def noted(self) -> bool:
        """Whether its format wants to know what linears on it read."""
        return not self.rounded

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.levels.largest.bit_length()

    @property
    @abstractmethod
    def bits_per_weight(self) -> float:
        """Bits with the weight's share of the parameters, in the formats that store the fewest."""

    @property
    @abstractmethod
    def clip_ratios(self) -> tuple[float, ...]:
        """Factors on a group's range that a search tries, 1 before all others."""

    @property
    def symmetric(self) -> bool:
        """Whether no zero point differs from the others."""
        return self.levels.symmetric

    @property
    def facts(self) -> Mapping[str, Any]:
        """What an output's record says of it."""
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}

    def with_bits(self, bits: int) -> Self:
        """Returns the scheme with codes of another width, where it has several."""
        assert bits == self.bits, f"{self} has no codes of {bits} bits; please report this"
        return self

    def fitted(self, *weights_OI: torch.Tensor) -> "Scheme":
        """Returns the scheme with what whole weights decide that share it, such as a scale of the tensor."""
        del weights_OI
        return self

    @abstractmethod
    def parameters(
        self, weight_OI: torch.Tensor, clip_ratios: Sequence[float] = (1.0,), importance_I: torch.Tensor | None = None
    ) -> Parameters:
        """Returns candidates [C, O, B], one for each ratio, of all that is stored of each group but its codes.

        `importance_I` (float32 [I], positive) weighs columns' squared errors in a search; None weighs all alike.
        Parameters that follow from a range do not ask.
        """

    @property
    def searched(self) -> bool:
        """Whether parameters come from a search that weighs columns by their importance."""
        return False

    @property
    def columns_at_once(self) -> int:
        """Columns of whole groups, in the order of rounding, that `compensated` takes at most."""
        return self.group_size

    def compensated(
        self, weight_SO: torch.Tensor, factor_SS: torch.Tensor, importance_S: torch.Tensor, clip_ratios: Sequence[float]
    ) -> CompensatedBlocks:
        """Rounds columns [S, O] one after the other with `factor_SS`, their part of U (`kernels.compensation`).

        `importance_S` weighs columns' squared errors in a search; each row takes the best of the clip ratios.
        """
        candidates = self.parameters(weight_SO.T, clip_ratios, importance_S)
        found = compensate_group(weight_SO, factor_SS, candidates, self.levels)
        return CompensatedBlocks(found.codes_SO, found.errors_SO, candidates, found.chosen_O)

    def round_plainly(
        self, weight_OI: torch.Tensor, importance_I: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Parameters]:
        """Rounds to the nearest levels of `parameters`: codes uint8 [O, I], and parameters [O, B]."""
        parameters = self.parameters(weight_OI, (1.0,), importance_I).each(lambda part: part[0])
        return grids.round_rows(weight_OI, parameters, self.levels), parameters

    def scaled_differences(self, weight_OI: torch.Tensor, column_scales_CI: torch.Tensor) -> torch.Tensor:
        """Returns errors of plain rounding with columns scaled by s, Q(W diag(s)) diag(s)^-1 - W, float32 [C, O, I]."""
        differences = []
        for scales_I in column_scales_CI:
            scaled_OI = weight_OI * scales_I
            codes_OI, parameters = self.fitted(scaled_OI).round_plainly(scaled_OI)
            rounded_OI = grids.dequantize_rows(codes_OI, parameters, self.levels)
            differences.append(rounded_OI.div_(scales_I).sub_(weight_OI))
        return torch.stack(differences)


def fitted_together(schemes: Sequence[Scheme], weights: Sequence[torch.Tensor]) -> list[Scheme]:
    """Returns the schemes of weights that read one input, fitted: those that are alike share what they decide, since
    engines fuse such linears under one scale of the tensor."""
    own: dict[Scheme, list[torch.Tensor]] = {}
    for scheme, weight_OI in zip(schemes, weights, strict=True):
        own.setdefault(scheme, []).append(weight_OI)
    fits = {scheme: scheme.fitted(*those) for scheme, those in own.items()}
    return [fits[scheme] for scheme in schemes]


def widest_vectors(schemes: Iterable[Scheme]) -> Scheme | None:
    """Returns the scheme whose order of columns all that are rounded can take; None where none is.

    They have the same `units`.
    """
    return max((one for one in schemes if one.rounded), key=lambda scheme: scheme.vector_size, default=None)
