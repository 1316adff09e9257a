"""What the kernels' tests put into them."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from dsquant.kernels import grids
from dsquant.kernels.values import Kind, Levels, Parameters
from dsquant.schemes import Grid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = settings(max_examples=3, deadline=None)
bits_of_codes = st.integers(2, 8)
few_rows = st.integers(1, 34)  # of which the kernels take 32 or 64 at once
seeds = st.integers(0, 2**20)
TABLE = Levels(4, Kind.TABLE, table=(-3.0, -1.0, 0.0, 1.5, 4.0), thresholds=(-2.0, -0.5, 0.75, 2.75))
OFFSETS = Levels(15, Kind.OFFSETS)
FIXED = Levels(7, fixed=True)
OTHERS = [TABLE, OFFSETS, FIXED]


def random_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Normal weights with an all-zero row, a one-sided one and outliers."""
    weight_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight_OI[:, ::29] *= 6
    weight_OI[rows // 2] = 0
    weight_OI[rows // 3].abs_()
    return weight_OI


def random_gram(columns: int, seed: int) -> torch.Tensor:
    inputs_RI = torch.randn(3 * columns, columns, generator=torch.Generator().manual_seed(seed))
    inputs_RI[:, 1:] += inputs_RI[:, :-1]
    inputs_RI[:, ::17] *= 5
    return inputs_RI.T @ inputs_RI / len(inputs_RI)


def factor_of(gram_II: torch.Tensor) -> torch.Tensor:
    inverse_II = torch.linalg.inv(gram_II.double() + 0.01 * gram_II.diagonal().mean() * torch.eye(len(gram_II)))
    return torch.linalg.cholesky(inverse_II, upper=True).float()


def random_parameters(rows: int, num_blocks: int, levels: Levels, seed: int, candidates: int = 3) -> Parameters:
    """Candidates of any levels: scales of any size, some of them 0 where that may be; offsets and zero points."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(candidates, rows, num_blocks, generator=generator) / max(levels.table or (levels.largest / 4,))
    zeros = torch.zeros_like(scales)
    if levels.movable:
        zeros = torch.randint(0, levels.largest + 1, scales.shape, generator=generator).float()
    else:
        scales[:, rows // 2] = 0
    if levels.fixed:
        scales[:, ::3] *= -1
        zeros += levels.middle
    return Parameters(scales.bfloat16().float(), scales * 4 if levels.kind == Kind.OFFSETS else zeros)


def integers(bits: int, symmetric: bool) -> Levels:
    return Grid(bits, 32, symmetric).levels


def coarse_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    return random_weight(rows, columns, seed).bfloat16().float()  # exact halves occur


def same_codes(weight_OI: torch.Tensor, candidates: Parameters, levels: Levels) -> None:
    """Rounding to given parameters, and back."""
    from dsquant.kernels import rounding_triton

    for place in range(len(candidates.scales)):
        one = candidates.each(lambda part, place=place: part[place])
        expected_OI = grids.round_rows_reference(weight_OI, one, levels)
        on_device = one.each(lambda part: part.to(DEVICE))
        assert torch.equal(rounding_triton.round_rows(weight_OI.to(DEVICE), on_device, levels).cpu(), expected_OI)
        for minus_OI in (None, weight_OI):
            wanted_OI = grids.dequantize_rows_reference(expected_OI, one, levels, minus_OI)
            minus = None if minus_OI is None else minus_OI.to(DEVICE)
            found_OI = rounding_triton.dequantize_rows(expected_OI.to(DEVICE), on_device, levels, minus)
            assert torch.equal(found_OI.cpu(), wanted_OI)
