"""Rounding to code books under scales that were found before, alone and with later vectors compensating earlier ones.

The scales of a super-block come from ggml on a CPU and from `code_book_search` on a GPU. Under a scale, a vector takes
the point of the least squared error, weighed by what a column's error costs. Compensation is GPTQ's with vectors
in the place of columns (as GPTVQ's, van Baalen et al., arXiv 2402.15319): with U the upper Cholesky factor of the
inverse Gram matrix and D the errors of 8 columns, E = U_bb^-T D is what later columns k change by, -U_bk^T E.

Shape legend: O rows, I columns, B blocks that share a scale, S columns of a super-block, N rows of 8 neighbouring
weights, A alternatives, K points, P weights of a point.
"""

from functools import cache

import torch

from dsquant.kernels import ggml
from dsquant.kernels.code_book_neighbours import nearest
from dsquant.kernels.code_book_search import SUPERS_AT_ONCE, search
from dsquant.kernels.code_books import (
    TYPES,
    VECTOR,
    BlockScales,
    Chosen,
    Vectors,
    points_of,
    scales_of,
    signs_of,
    values_of,
    vectors_of,
)
from dsquant.kernels.values import SUPER_BLOCK, CompensatedBlocks

# ggml ends a process whose products overflow: importances beyond these shares of their mean weigh no more, or no less,
# and weights beyond what any scale in float16 reaches are no larger.
IMPORTANCES = 1e-4, 1e4
LARGEST_WEIGHT = 1e9


@cache
def codes_of_points(type_name: str) -> torch.Tensor:
    """Returns the places of the points' values in `values_of`: uint8 [A, K, P]."""
    values = torch.tensor(values_of(type_name))
    return torch.searchsorted(values, points_of(type_name).contiguous()).to(torch.uint8)


@cache
def codes_on(device: torch.device, type_name: str) -> torch.Tensor:
    """Copies `codes_of_points` to a device once."""
    return codes_of_points(type_name).to(device)


@cache
def _points_by_key(type_name: str) -> torch.Tensor:
    """Returns the number of the point [A * K] that the digits of a key stand for, int64; -1 for no point."""
    codes_NP = codes_of_points(type_name).flatten(0, 1)
    base = len(values_of(type_name))
    if TYPES[type_name].signs != "delta":
        base, codes_NP = base // 2, codes_NP - base // 2
    found = torch.full((base ** codes_NP.shape[1],), -1)
    found[_keys(codes_NP, base)] = torch.arange(len(codes_NP))
    return found


def _keys(digits: torch.Tensor, base: int) -> torch.Tensor:
    """Numbers with these digits in the last dimension, the first lowest."""
    places = torch.tensor([base**place for place in range(digits.shape[-1])], device=digits.device)
    return (digits.long() * places).sum(-1)


def points_of_codes(codes_NW: torch.Tensor, factor_S: torch.Tensor, level_N: torch.Tensor, type_name: str) -> Chosen:
    """Returns what is stored of blocks whose codes [N, W] are points; factors, float16 [S], and levels go with them."""
    points_AKP, base = points_of(type_name), len(values_of(type_name))
    codes_NGP = codes_NW.unflatten(1, (-1, points_AKP.shape[2]))
    negative_NGP = torch.zeros_like(codes_NGP, dtype=torch.bool)
    if TYPES[type_name].signs != "delta":
        base //= 2
        negative_NGP = codes_NGP < base
        codes_NGP = torch.where(negative_NGP, base - 1 - codes_NGP, codes_NGP - base)
    number_NG = _points_by_key(type_name).to(codes_NW.device)[_keys(codes_NGP, base)]
    num_points = points_AKP.shape[1]
    return Chosen(factor_S, level_N, number_NG % num_points, negative_NGP, number_NG[:, 0] // num_points)


def block_scales(weight_OI: torch.Tensor, importance_I: torch.Tensor, type_name: str) -> BlockScales:
    """Searches the scales of all blocks; importances, float32 [I], weigh columns' squared errors."""
    if _by_search(weight_OI):
        return _searched(weight_OI, importance_I, type_name)[1]
    return _by_ggml(weight_OI, importance_I, type_name)[1]


def _by_ggml(weight_OI: torch.Tensor, importance_I: torch.Tensor, type_name: str) -> tuple[torch.Tensor, BlockScales]:
    """Stored rows, uint8 [O, bytes of a row], and their scales."""
    stored = ggml.quantize(_finite(weight_OI), type_name, _tamed(importance_I))
    factor_S, level_SB, alternative_SB = scales_of(stored.view(-1, TYPES[type_name].size), type_name)
    return stored, _scales(len(weight_OI), factor_S, level_SB, alternative_SB)


def _by_search(weight_OI: torch.Tensor) -> bool:
    """Whether scales are searched here: on a GPU, and where ggml is not installed."""
    return weight_OI.is_cuda or ggml.library() is None


def _finite(weight_OI: torch.Tensor) -> torch.Tensor:
    return weight_OI.nan_to_num(0, 0, 0).clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)


def _tamed(importance_I: torch.Tensor) -> torch.Tensor:
    """Importances relative to their mean, within bounds; ones where nothing is known."""
    mean = importance_I.double().mean()
    relative_I = (importance_I / torch.where(mean > 0, mean, 1.0)).float()
    return torch.where(mean > 0, relative_I.nan_to_num(1.0), 1.0).clamp(*IMPORTANCES)


def _scales(num_rows: int, factor_S: torch.Tensor, level_SB: torch.Tensor, alternative_SB: torch.Tensor) -> BlockScales:
    factor_SB = factor_S.unsqueeze(1).expand_as(level_SB)
    found = (factor_SB * (2 * level_SB + 1), factor_SB, alternative_SB)
    return BlockScales(*(part.reshape(num_rows, -1) for part in found))


def _searched(weight_OI: torch.Tensor, importance_I: torch.Tensor, type_name: str) -> tuple[torch.Tensor, BlockScales]:
    """Codes, uint8 [O, I], and scales of a search."""
    find, at_once = search, SUPERS_AT_ONCE
    if weight_OI.is_cuda:
        from dsquant.kernels import code_books_triton

        find, at_once = code_books_triton.search, code_books_triton.SUPERS_AT_ONCE
    weight_SW = _finite(weight_OI).reshape(-1, SUPER_BLOCK)
    importance_SW = _tamed(importance_I).expand_as(weight_OI).reshape(-1, SUPER_BLOCK)
    codes, scales = [], []
    for part in zip(weight_SW.split(at_once), importance_SW.split(at_once), strict=True):
        chosen = find(vectors_of(*part, type_name))
        codes.append(_codes(chosen.alternative_N, chosen.index_NG, chosen.negative_NGP, type_name))
        level_SB, alternative_SB = (
            values_N.view(len(part[0]), -1) for values_N in (chosen.level_N, chosen.alternative_N)
        )
        scales.append((chosen.factor_S.float(), level_SB, alternative_SB))
    joined = _scales(len(weight_OI), *(torch.cat(same) for same in zip(*scales, strict=True)))
    return torch.cat(codes).view_as(weight_OI), joined


def _codes(
    alternative_N: torch.Tensor, index_NG: torch.Tensor, negative_NGP: torch.Tensor, type_name: str
) -> torch.Tensor:
    """The codes of chosen points, uint8 [N, G, P]."""
    codes_NGP = codes_on(index_NG.device, type_name)[alternative_N.unsqueeze(1), index_NG]
    if TYPES[type_name].signs == "delta":
        return codes_NGP
    return torch.where(negative_NGP, len(values_of(type_name)) - 1 - codes_NGP, codes_NGP)


def round_vectors(
    weight_OI: torch.Tensor, importance_I: torch.Tensor, type_name: str
) -> tuple[torch.Tensor, BlockScales]:
    """Rounds each vector alone: codes, uint8 [O, I], and scales."""
    if _by_search(weight_OI):
        return _searched(weight_OI, importance_I, type_name)
    stored, scales = _by_ggml(weight_OI, importance_I, type_name)
    return _decoded(stored, scales, type_name), scales


def _decoded(stored: torch.Tensor, scales: BlockScales, type_name: str) -> torch.Tensor:
    """The codes of stored rows, uint8 [O, I], from what gguf-py decodes; the first point's in blocks of zeros."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values_OI = torch.from_numpy(dequantize(stored.numpy(), GGMLQuantizationType[type_name]))
    scale_OI = scales.scale_OB.repeat_interleave(TYPES[type_name].block, 1)
    table = torch.tensor(values_of(type_name))
    codes_OI = torch.bucketize(values_OI / scale_OI, (table[:-1] + table[1:]) / 2)
    first_P = codes_of_points(type_name)[0, 0]
    first_OI = first_P.repeat(values_OI.shape[1] // len(first_P)).expand_as(values_OI)
    return torch.where(scale_OI == 0, first_OI, codes_OI).to(torch.uint8)


def nearest_points(
    values_N8: torch.Tensor, importance_8: torch.Tensor, scale_N: torch.Tensor, alternative_N: torch.Tensor,
    type_name: str,
) -> torch.Tensor:  # fmt: skip
    """Returns the codes of the points of the least error under scales, uint8 [N, 8]."""
    kind, (_, num_points, width) = TYPES[type_name], points_of(type_name).shape
    values_NGP = values_N8.unflatten(1, (-1, width))
    importance_NGP = importance_8.view(-1, width).expand_as(values_NGP)
    best = nearest(values_NGP, importance_NGP, scale_N, 0, type_name)
    if kind.shifted:
        other = nearest(values_NGP, importance_NGP, scale_N, 1, type_name)
        other_N1 = (alternative_N == 1).unsqueeze(1)
        best = best.where(other, other.error_EG < best.error_EG if kind.shifted == "vectors" else other_N1)
    vectors = Vectors(values_NGP, importance_NGP, type_name)
    index_NG = best.number_EG % num_points
    codes_NGP = _codes(alternative_N, index_NG, signs_of(vectors, index_NG, best.flipped_EG), type_name)
    return codes_NGP.flatten(1)


def compensate_vectors(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, importance_S: torch.Tensor, type_name: str
) -> CompensatedBlocks:
    """Rounds the vectors of a super-block one after the other, under scales that are searched before the first.

    The columns, float32 [256, O], are whole vectors in the order of rounding. Of `factor_SS`, their part of U, nothing
    below the diagonal is read. `importance_S`, positive, weighs squared errors.
    """
    scales = block_scales(weight_SO.T.contiguous(), importance_S, type_name)
    arguments = weight_SO, factor_SS, _tamed(importance_S), scales, type_name
    if weight_SO.is_cuda:
        from dsquant.kernels import code_book_rounding_triton

        codes_AKP = codes_on(weight_SO.device, type_name)
        codes_SO, errors_SO = code_book_rounding_triton.compensate_points(*arguments, codes_AKP)
    else:
        codes_SO, errors_SO = compensate_points_reference(*arguments)
    return CompensatedBlocks(codes_SO, errors_SO, scales.parameters)


def compensate_points_reference(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, importance_S: torch.Tensor, scales: BlockScales, type_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds vectors one after the other under given scales, in PyTorch on any device: codes, uint8 [S, O], and errors
    over U, float32 [S, O]."""
    kind = TYPES[type_name]
    table, working_SO = torch.tensor(values_of(type_name), device=weight_SO.device), weight_SO.clone()
    codes_SO, errors_SO = torch.empty_like(weight_SO, dtype=torch.uint8), torch.empty_like(weight_SO)
    for start in range(0, len(weight_SO), VECTOR):
        stop, block = start + VECTOR, start // kind.block
        scale_O, alternative_O = scales.scale_OB[:, block], scales.alternative_OB[:, block]
        codes_O8 = nearest_points(working_SO[start:stop].T, importance_S[start:stop], scale_O, alternative_O, type_name)
        codes_SO[start:stop] = codes_O8.T
        errors_8O = working_SO[start:stop] - table[codes_O8.long()].T * scale_O
        errors_8O = torch.linalg.solve_triangular(factor_SS[start:stop, start:stop].T, errors_8O, upper=False)
        working_SO[stop:].addmm_(factor_SS[start:stop, stop:].T, errors_8O, alpha=-1)
        errors_SO[start:stop] = errors_8O
    return codes_SO, errors_SO
