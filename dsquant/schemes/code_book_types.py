"""The types of ggml whose codes stand for vectors of weights: IQ1, IQ2 and IQ3.

A weight's code is the place of its value among all that the code book's points have, so a weight of this scheme is
computed like one of any table; that the codes of a vector make a point, rounding sees to.

Shape legend: C candidates, O out features, I in features, S columns of a super-block, B blocks along I.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from dsquant.kernels.code_book_rounding import block_scales, compensate_vectors, round_vectors
from dsquant.kernels.code_books import TYPES, VECTOR, CodeBookType, values_of
from dsquant.kernels.values import SUPER_BLOCK, CompensatedBlocks, Kind, Levels, Parameters
from dsquant.schemes.scheme import Scheme

# Those of all types of ggml: linears that read the same inputs share the order of their columns.
BLOCKS = (16, 32, SUPER_BLOCK)


@dataclass(frozen=True)
class CodeBook(Scheme):
    """A type of ggml, by data."""

    name: str

    @property
    def kind(self) -> CodeBookType:
        return TYPES[self.name]

    @property
    def group_size(self) -> int:
        """A super-block."""
        return SUPER_BLOCK

    @property
    def block_size(self) -> int:
        return self.kind.block

    @property
    def levels(self) -> Levels:
        values = values_of(self.name)
        middles = tuple((low + high) / 2 for low, high in pairwise(values))
        return Levels(len(values) - 1, Kind.TABLE, table=values, thresholds=middles)

    @property
    def units(self) -> tuple[int, ...]:
        return BLOCKS

    @property
    def vector_size(self) -> int:
        return VECTOR

    @property
    def single(self) -> bool:
        """Codes of a vector change together only."""
        return False

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.kind.size / SUPER_BLOCK

    @property
    def clip_ratios(self) -> tuple[float, ...]:
        """What the search found."""
        return (1.0,)

    @property
    def searched(self) -> bool:
        """By columns' importance."""
        return True

    def parameters(
        self, weight_OI: torch.Tensor, clip_ratios: Sequence[float] = (1.0,), importance_I: torch.Tensor | None = None
    ) -> Parameters:
        """Searches scales (`kernels.code_book_rounding`), one candidate whatever the ratios."""
        return block_scales(weight_OI, _given(weight_OI, importance_I), self.name).parameters.each(
            lambda part: part.unsqueeze(0)
        )

    def round_plainly(
        self, weight_OI: torch.Tensor, importance_I: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Parameters]:
        codes_OI, scales = round_vectors(weight_OI, _given(weight_OI, importance_I), self.name)
        return codes_OI, scales.parameters

    def compensated(
        self, weight_SO: torch.Tensor, factor_SS: torch.Tensor, importance_S: torch.Tensor, clip_ratios: Sequence[float]
    ) -> CompensatedBlocks:
        """Rounds vector by vector."""
        return compensate_vectors(weight_SO, factor_SS, importance_S, self.name)


def _given(weight_OI: torch.Tensor, importance_I: torch.Tensor | None) -> torch.Tensor:
    return torch.ones_like(weight_OI[0]) if importance_I is None else importance_I
