"""Inverses of triangular matrices."""

import pytest
import torch

from dsquant.kernels.triangular import BLOCK, upper_inverse


@pytest.mark.parametrize("size", [1, 37, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK - 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_inverse_of_an_upper_triangular_matrix_is_that_of_solving_for_the_identity(size: int, device: str) -> None:
    values = torch.randn(size, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)).to(device)
    upper = torch.linalg.cholesky(values @ values.T / size).mT.contiguous()
    wanted = torch.linalg.solve_triangular(upper, torch.eye(size, dtype=torch.float64, device=device), upper=True)
    found = upper_inverse(upper + torch.ones_like(upper).tril(-1))  # what is below the diagonal is not read
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * float(wanted.abs().max()))
    assert not found.tril(-1).any()
