"""Floats of four bits in blocks: NVFP4 and MXFP4.

Codes are ranks among the 15 values of E2M1, from -6 to 6; a writer makes its own bits of them. Values halfway between
two go to the one with an even mantissa.

Reference: OCP Microscaling Formats v1.0; compressed-tensors' `quantization/utils/helpers.py` (NVFP4) and
`mx_utils.py` (MXFP4), https://github.com/neuralmagic/compressed-tensors

Shape legend: C candidates, O out features, I in features, B blocks along I.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from dsquant.kernels.values import Kind, Levels, Parameters, numbers_on
from dsquant.schemes.scheme import Scheme

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The value of each code of three bits; the fourth is the sign."""
LARGEST_E4M3, SMALLEST_E4M3 = 448.0, 2.0**-9
SMALLEST_E8M0, LARGEST_E8M0 = 2.0**-126, 2.0**127
# From where the largest weight is the value 4 (a scale of 1.5: "Four over Six", arXiv 2512.02010) to a clipped one.
NVFP4_RATIOS = (1.0, 1.5, 1.35, 1.25, 1.15, 1.07, 0.94, 0.88, 0.82, 0.76)
MXFP4_RATIOS = (1.0, 2.0, 0.5)


def _float32_below(number: float) -> float:
    """The next smaller float32; not for powers of two."""
    return number - math.ulp(number) * 2**29


def _e2m1_levels() -> Levels:
    upper = [
        (low + high) / 2 if rank % 2 == 0 else _float32_below((low + high) / 2)
        for rank, (low, high) in enumerate(pairwise(E2M1_VALUES))
    ]
    lower = [
        -(low + high) / 2 if rank % 2 else _float32_below(-(low + high) / 2)
        for rank, (low, high) in enumerate(pairwise(E2M1_VALUES))
    ]
    values = (*(-value for value in reversed(E2M1_VALUES[1:])), *E2M1_VALUES)
    return Levels(len(values) - 1, Kind.TABLE, table=values, thresholds=(*reversed(lower), *upper))


E2M1 = _e2m1_levels()
_ZERO = len(E2M1_VALUES) - 1  # the rank of 0


def e2m1_bits(codes: torch.Tensor) -> torch.Tensor:
    """Returns E2M1's four bits, the sign the highest, of codes, uint8 of any shape; 0 has no sign."""
    signed = codes.short() - _ZERO
    return (signed.abs() + 8 * (signed < 0)).to(torch.uint8)


def codes_of_bits(bits: torch.Tensor) -> torch.Tensor:
    """Undoes `e2m1_bits`; a negative zero becomes zero."""
    magnitudes = (bits & 7).short()
    return (_ZERO + torch.where(bits > 7, -magnitudes, magnitudes)).to(torch.uint8)


@dataclass(frozen=True)
class Nvfp4(Scheme):
    """E2M1 in blocks of 16 whose scales are E4M3 times one scale of the tensor."""

    tensor_scale: float = 0.0
    """A power of two, so that products are exact in whatever order an engine forms them; 0 before `fitted`."""
    output: str = ""
    """Keeps apart outputs that quantize other linears."""
    inputs: bool = False
    """Whether engines round inputs to it too, under one scale of each linear's inputs that the output has."""

    @property
    def group_size(self) -> int:
        """Blocks choose alone."""
        return 16

    @property
    def noted(self) -> bool:
        return self.inputs

    @property
    def levels(self) -> Levels:
        return E2M1

    @property
    def bits_per_weight(self) -> float:
        """Codes and a byte for each block."""
        return 4.5

    @property
    def clip_ratios(self) -> tuple[float, ...]:
        """Scales that are larger too: E2M1 is coarse between 4 and 6."""
        return NVFP4_RATIOS

    def fitted(self, *weights_OI: torch.Tensor) -> "Nvfp4":
        """Returns the scheme with the tensors' scale: E4M3 reaches 1.5 times their largest weight (waits for a GPU)."""
        if self.tensor_scale:
            return self
        most = max(float(weight_OI.abs().max()) for weight_OI in weights_OI)
        largest = most * max(NVFP4_RATIOS) / (E2M1_VALUES[-1] * LARGEST_E4M3)
        return replace(self, tensor_scale=2.0 ** math.ceil(math.log2(max(largest, SMALLEST_E8M0))))

    def parameters(
        self, weight_OI: torch.Tensor, clip_ratios: Sequence[float] = (1.0,), importance_I: torch.Tensor | None = None
    ) -> Parameters:
        """Makes each block's largest weight times the ratio the value 6, as near as E4M3 comes."""
        del importance_I
        assert self.tensor_scale, "NVFP4 before `fitted` has no scale of the tensor; please report this"
        wanted_COB = _largest_of_blocks(weight_OI, 16, clip_ratios) * (1 / (E2M1_VALUES[-1] * self.tensor_scale))
        stored_COB = wanted_COB.clamp_(SMALLEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn).float()
        return Parameters(stored_COB * self.tensor_scale, torch.zeros_like(stored_COB))


@dataclass(frozen=True)
class Mxfp4(Scheme):
    """E2M1 in blocks of 32 whose scales are powers of two (E8M0)."""

    output: str = ""
    """Keeps apart outputs that quantize other linears."""

    @property
    def group_size(self) -> int:
        """Blocks choose alone."""
        return 32

    @property
    def levels(self) -> Levels:
        return E2M1

    @property
    def bits_per_weight(self) -> float:
        return 4.25

    @property
    def clip_ratios(self) -> tuple[float, ...]:
        """The exponents next to the plain one."""
        return MXFP4_RATIOS

    def parameters(
        self, weight_OI: torch.Tensor, clip_ratios: Sequence[float] = (1.0,), importance_I: torch.Tensor | None = None
    ) -> Parameters:
        """Takes the exponent of the block's largest weight, rounded to one bit of mantissa, less 2.

        So 7/4 of a power of two and more is halved once more, and less than that is at most 7 steps, next to 6.
        """
        del importance_I
        bits_COB = _largest_of_blocks(weight_OI, 32, clip_ratios).view(torch.int32)
        powers_COB = ((bits_COB + (1 << 21)) & (0xFF << 23)).view(torch.float32)
        scales_COB = (powers_COB / 4).clamp_(SMALLEST_E8M0, LARGEST_E8M0)
        return Parameters(scales_COB, torch.zeros_like(scales_COB))


def _largest_of_blocks(weight_OI: torch.Tensor, block_size: int, clip_ratios: Sequence[float]) -> torch.Tensor:
    """The largest magnitude of each block, times each ratio, float32 [C, O, B]."""
    ratios_C11 = numbers_on(weight_OI.device, tuple(clip_ratios)).view(-1, 1, 1)
    return weight_OI.unflatten(1, (-1, block_size)).abs().amax(-1) * ratios_C11
