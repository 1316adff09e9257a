"""The searches for ggml's scales on a GPU, in Triton's interpreter without one, beside their references."""

import pytest
import torch

from dsquant.kernels import scale_search
from dsquant.schemes.ggml_types import BLOCK_TYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _blocks(size: int, number: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks as columns, one of zeros, one of a single sign; weights of all columns that are one vector."""
    generator = torch.Generator().manual_seed(size)
    weight_WN = torch.randn(size, number, generator=generator) * 0.02
    weight_WN[:, 3] = 0
    weight_WN[:, 5] = weight_WN[:, 5].abs() + 0.01
    return weight_WN, torch.rand(size, 1, generator=generator).expand(size, number) + 0.1


@pytest.mark.parametrize("name", ["Q2_K", "Q4_1", "Q3_K", pytest.param("IQ4_XS", marks=pytest.mark.slow), "Q8_0"])
def test_blocks_get_the_same_scales_as_from_the_reference(name: str) -> None:
    from dsquant.kernels import scale_search_triton

    shape = BLOCK_TYPES[name].shape
    both = _blocks(shape.size)
    on_device = tuple(part.to(DEVICE) for part in both)
    if name in ("Q2_K", "Q4_1"):
        options = (shape.levels.largest, name == "Q4_1")
        found = scale_search_triton.affine_search(*on_device, *options)
        wanted = scale_search.affine_search_reference(*both, *options)
    else:
        found = (scale_search_triton.symmetric_search(*on_device, shape.levels),)
        wanted = (scale_search.symmetric_search_reference(*both, shape.levels),)
    same_N = torch.stack(
        [
            torch.isclose(ours_N.cpu(), theirs_N, rtol=1e-4, atol=1e-8)
            for ours_N, theirs_N in zip(found, wanted, strict=True)
        ]
    ).all(0)
    assert float(same_N.float().mean()) > 0.85  # of candidates that are equally good, either


@pytest.mark.parametrize("codes", [(0, 15), (0, 63), (-32, 31), (-128, 127)])
def test_super_blocks_get_the_same_factors_as_from_the_reference(codes: tuple[int, int]) -> None:
    from dsquant.kernels import scale_search_triton

    generator = torch.Generator().manual_seed(codes[1])
    values_SB = torch.randn(40, 8, generator=generator) * 1e-4
    values_SB = values_SB if codes[0] else values_SB.abs()
    values_SB[2] = 0
    shares_SB = torch.rand(40, 8, generator=generator) + 0.1
    found = scale_search_triton.stored_factors(values_SB.to(DEVICE), shares_SB.to(DEVICE), codes)
    factors, wanted = (
        (factor_S1.float() * codes_SB).cpu()
        for factor_S1, codes_SB in (found, scale_search.scale_search_reference(values_SB, shares_SB, codes))
    )
    assert float(torch.isclose(factors, wanted, rtol=1e-3, atol=1e-9).all(1).float().mean()) > 0.9
