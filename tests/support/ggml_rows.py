"""Rows for ggml's types to round, and the errors that are left."""

import gguf as gguf_py
import numpy as np
import torch
from gguf.quants import dequantize

KINDS = ("gauss", "heavy tails", "outlier columns", "positive", "tiny", "huge")


def weights(kind: str, num_rows: int = 32, num_columns: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a kind, and importances of their columns that differ by e squared."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    rows_RI = torch.randn(num_rows, num_columns, generator=generator) * 0.02
    if kind == "heavy tails":
        rows_RI *= torch.randn(num_rows, num_columns, generator=generator).exp()
    elif kind == "outlier columns":
        rows_RI *= torch.randn(num_columns, generator=generator).exp()
    elif kind == "positive":
        rows_RI = rows_RI.abs() + 0.01
    elif kind in ("tiny", "huge"):
        rows_RI *= 1e-3 if kind == "tiny" else 1e5
    return rows_RI, torch.randn(num_columns, generator=generator).exp()


def awkward_rows() -> torch.Tensor:
    """Zero rows, blocks and super-blocks; constant blocks of either sign; one weight alone; ties of rounding."""
    rows_RI = torch.randn(7, 768, generator=torch.Generator().manual_seed(9)) * 0.02
    rows_RI[0], rows_RI[1, :256], rows_RI[2, 32:64] = 0, 0, 0
    rows_RI[3, :32], rows_RI[3, 32:64] = 0.25, -0.25
    rows_RI[4], rows_RI[4, 100] = 0, -3.0
    rows_RI[5, :32] = torch.arange(32) - 15.5
    rows_RI[5, 0] = 127
    rows_RI[6, 256:512] = rows_RI[6, 256:512].abs()
    return rows_RI


def decoded(stored: torch.Tensor, type_name: str) -> torch.Tensor:
    values = dequantize(stored.cpu().numpy(), gguf_py.GGMLQuantizationType[type_name])
    return torch.from_numpy(np.array(values, dtype=np.float32))


def weighted_error(stored: torch.Tensor, type_name: str, rows_RI: torch.Tensor, importance_I: torch.Tensor) -> float:
    """By the weights that ggml gives the columns, relative to the rows."""
    weights_RI = importance_I.expand_as(rows_RI)
    if type_name in ("Q4_K", "Q5_K"):
        squares = rows_RI.unflatten(1, (-1, 256)).square()
        weights_RI = weights_RI * (2 * squares.mean(2, keepdim=True) + squares).sqrt().flatten(1)
    errors_RI = decoded(stored, type_name) - rows_RI
    return float((weights_RI * errors_RI.square()).sum() / (weights_RI * rows_RI.square()).sum()) ** 0.5
