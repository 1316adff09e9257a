"""Error-compensating rounding: columns that are rounded later compensate the errors of earlier ones.

The update is GPTQ's (Frantar et al., arXiv 2210.17323, algorithm 1): with U the upper Cholesky factor of the inverse
Gram matrix, rounding column j with error e changes column k > j by -e / U_jj * U_jk, and costs (e / U_jj)^2 of output
error once all later columns have been changed. The AWQ scales are folded in before. Two things differ from the
reference implementation: columns are sorted by their input's energy inside their block, blocks inside their group and
groups by theirs, so that no index has to be stored; and each group's range is scaled (AWQ's clipping) by the ratio of
the least such error.

Inputs wider than a Gram matrix is kept of are compensated in parts, or by a matrix that their layer shares
(docs/decisions/0018).

Shape legend: O out features, I in features, G groups, B blocks that share a scale, S = group size.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from dsquant.kernels.graphs import replayed
from dsquant.kernels.precision import fast_matmuls
from dsquant.kernels.products import NEAR
from dsquant.kernels.threads import side_by_side
from dsquant.kernels.triangular import upper_inverse
from dsquant.kernels.values import CompensatedBlocks, Parameters, joined_blocks, parameters_of
from dsquant.quantization.clip import PARTS_AT_ONCE, clipped_with_losses, rows_of_part
from dsquant.quantization.statistics import InputMoments, InverseFactor
from dsquant.schemes import QuantizedWeight, Scheme, joined, quantized, stacked

# The Gram matrix's diagonal is raised by this share of its mean, for each feature over a token: of few tokens it knows
# little, and compensation would fit their noise (docs/decisions/0006).
DAMPING = 0.2
LEAST_DAMPING = 0.005
# Its other entries are lowered by this share: correlations of the calibration's texts hold less in others
# (docs/decisions/0042).
SHRINKAGE = 0.05


def compensated_weight(
    weight_OI: torch.Tensor, scheme: Scheme, moments: InputMoments, clip_ratios: Sequence[float] | None = None
) -> QuantizedWeight:
    """Rounds a weight [O, I] so that errors of different columns cancel in the output.

    Where the moments hold neither Gram matrices nor `inverses`, or no token, ranges are clipped and columns rounded
    independently: errors must not be hidden where a sketch is blind. Ratios are as in `clipped_weight`. No row errs
    more than with clipping alone, as the moments estimate it.
    """
    clipped, losses_O = clipped_with_losses(weight_OI, scheme, moments, clip_ratios)
    ratios = scheme.clip_ratios if clip_ratios is None else clip_ratios
    inverses = with_inverses(moments, scheme).inverses
    if not inverses or not moments.count:
        return clipped

    def loss_O(part_OI: torch.Tensor, rounded: QuantizedWeight) -> torch.Tensor:
        with fast_matmuls(part_OI.device):
            return moments.loss_O(rounded.difference(part_OI))

    def better_rows(part: tuple[torch.Tensor, QuantizedWeight, torch.Tensor | None]) -> QuantizedWeight:
        part_OI, clipped_part, known_O = part
        compensated = _compensate_parts(part_OI, clipped_part.grid, ratios, inverses)
        clipped_O = loss_O(part_OI, clipped_part) if known_O is None else known_O
        return compensated.or_else(clipped_part, loss_O(part_OI, compensated) < clipped_O)

    num_rows = rows_of_part(weight_OI)
    parts = (weight_OI.split(num_rows), clipped.split(num_rows))
    known = [None] * len(parts[0]) if losses_O is None else losses_O.split(num_rows)
    return stacked(side_by_side(better_rows, zip(*parts, known, strict=True), PARTS_AT_ONCE))


def with_inverses(moments: InputMoments, scheme: Scheme) -> InputMoments:
    """Computes `inverses` from the Gram matrices, once for all weights that read these inputs.

    Moments that have them, hold no Gram matrix of whole groups, or no token, are returned unchanged.
    """
    grams = moments.parts_PWW if moments.gram_II is None else [moments.gram_II]
    if moments.inverses or grams is None or not moments.count or len(grams[0]) % scheme.group_size:
        return moments
    return replace(moments, inverses=tuple(_inverse(gram_II, scheme, moments.count) for gram_II in grams))


def damping_of(num_features: int, num_tokens: int) -> float:
    """Returns the share of the Gram matrix's mean diagonal by which the diagonal is raised."""
    return max(LEAST_DAMPING, DAMPING * num_features / num_tokens)


def damped(gram_II: torch.Tensor, damping: float) -> torch.Tensor:
    """Raises a Gram matrix's diagonal by a share of its mean, in place; by the share itself where all is zero."""
    mean = gram_II.diagonal().mean()
    gram_II.diagonal().add_(damping * torch.where(mean > 0, mean, 1.0))
    return gram_II


def regularized(gram_II: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Returns a copy of a Gram matrix over some tokens whose diagonal counts more, as errors are compensated by it."""
    diagonal_I = gram_II.diagonal().clone()
    shrunk_II = gram_II * (1 - SHRINKAGE)
    shrunk_II.diagonal().copy_(diagonal_I)
    return damped(shrunk_II, damping_of(len(gram_II), num_tokens))


def _order(energy_I: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Returns the columns in the order of rounding, int64 [I]: units inside units, the most energetic of each first."""
    order_I = torch.arange(len(energy_I), device=energy_I.device)
    units = [unit for unit in scheme.units if len(energy_I) % unit == 0]
    for unit, whole in pairwise((scheme.vector_size, *units, len(energy_I))):
        parts = (-1, whole // unit, unit)
        ranks = energy_I.unflatten(0, parts).sum(2).argsort(dim=1, descending=True, stable=True)
        order_I = order_I.unflatten(0, parts).take_along_dim(ranks.unsqueeze(2), 1).flatten()
    return order_I


def _inverse(gram_II: torch.Tensor, scheme: Scheme, num_tokens: int) -> InverseFactor:
    """The order of rounding, and U with U^T U the inverse of the regularized Gram matrix H in that order.

    With H = V V^T and V upper triangular (the Cholesky factor of H with rows and columns in reverse order), U = V^-1.
    Where H is not finite U is not either, its losses compare as false, and rows stay clipped. Nothing here waits for a
    GPU.
    """
    order_I = _order(gram_II.diagonal(), scheme)
    reverse_I = order_I.flip(0)
    upper_II = torch.linalg.cholesky_ex(regularized(gram_II[reverse_I][:, reverse_I].double(), num_tokens)).L.flip(0, 1)
    return InverseFactor(order_I, upper_inverse(upper_II).float())


def _compensate_parts(
    weight_OI: torch.Tensor, scheme: Scheme, clip_ratios: Sequence[float], inverses: Sequence[InverseFactor]
) -> QuantizedWeight:
    with fast_matmuls(weight_OI.device):
        parts = zip(weight_OI.split(len(inverses[0].order_I), dim=1), inverses, strict=True)
        return joined([_compensate(part_OI, scheme, clip_ratios, inverse) for part_OI, inverse in parts])


def _compensate(
    weight_OI: torch.Tensor, scheme: Scheme, clip_ratios: Sequence[float], inverse: InverseFactor
) -> QuantizedWeight:
    """Group by group; a search for parameters weighs a column's error by what it costs once it is compensated. A
    group's errors change the columns next to it at once, and those farther on in one product for many groups."""
    ratios, order_I = tuple(clip_ratios), inverse.order_I
    near_columns = scheme.columns_at_once * max(1, NEAR // scheme.columns_at_once)

    def compensated(working_IO: torch.Tensor, factor_II: torch.Tensor) -> tuple[torch.Tensor, ...]:
        importance_I = factor_II.diagonal().square().reciprocal()
        codes, parameters = list[torch.Tensor](), list[Parameters]()
        for near in range(0, len(working_IO), near_columns):
            far, found = min(near + near_columns, len(working_IO)), list[CompensatedBlocks]()
            for start in range(near, far, scheme.columns_at_once):
                stop = min(start + scheme.columns_at_once, far)
                part = slice(start, stop)
                rounded = scheme.compensated(working_IO[part], factor_II[part, part], importance_I[part], ratios)
                working_IO[stop:far].addmm_(factor_II[part, stop:far].T, rounded.errors_SO, alpha=-1)
                found.append(rounded)
            errors_NO = torch.cat([part.errors_SO for part in found])
            working_IO[far:].addmm_(factor_II[near:far, far:].T, errors_NO, alpha=-1)
            codes.append(torch.cat([part.codes_SO for part in found]))
            parameters.append(parameters_of(found))
        joined = joined_blocks(parameters)
        return torch.cat(codes), joined.scales, joined.zero_points, *joined.super_scales

    sorted_IO = weight_OI[:, order_I].T.contiguous()
    codes_IO, scales_OB, zero_points_OB, *supers = replayed(compensated, (scheme, ratios), sorted_IO, inverse.factor_II)
    place_I, place_B = order_I.argsort(), (order_I[:: scheme.block_size] // scheme.block_size).argsort()
    parameters = Parameters(scales_OB, zero_points_OB, tuple(supers)).each(lambda part: part[:, place_B])
    return quantized(codes_IO[place_I].T.contiguous(), parameters, scheme)
