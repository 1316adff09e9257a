"""Inputs of linears, and what their moments tell."""

import torch

from dsquant.quantization.statistics import InputMoments, InputStatistics


def moments_of(inputs: torch.Tensor, parts: int = 1) -> InputMoments:
    statistics = InputStatistics(inputs.shape[1], seed=0)
    for part in inputs.chunk(parts):
        statistics.add(part)
    return statistics.moments()


def correlated(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    spread = torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator) @ mixing * spread
