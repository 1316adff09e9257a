"""Searches AWQ's scales (Lin et al., AWQ, arXiv 2306.00978, section 3.2) on second moments of the inputs.

Shape legend: C candidates, O out features, I in features.
"""

from collections.abc import Callable, Sequence
from typing import overload

import torch

from dsquant.jobs.ranks import ALONE, Ranks
from dsquant.kernels.precision import fast_matmuls
from dsquant.kernels.threads import side_by_side
from dsquant.model.structure import ScaleGroup
from dsquant.quantization.clip import ELEMENTS_AT_ONCE
from dsquant.quantization.statistics import GPU_ELEMENTS_AT_ONCE, InputMoments
from dsquant.schemes import Scheme

NUM_RATIOS = 20
# The scale search reads at most this many rows of a weight, evenly spaced: the loss is a sum over rows.
SEARCH_ROWS = 512
# Of the mean energy of a weight's columns: a column without weights would get infinite energy.
LEAST_COLUMN = 1e-6


def rms_of_columns(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the root mean square of each column over all rows of several weights [O, I], float32 [I]."""
    squares_I = torch.stack([weight_OI.square().sum(0) for weight_OI in weights]).sum(0)
    return (squares_I / sum(len(weight_OI) for weight_OI in weights)).sqrt()


def candidate_scales(activation_I: torch.Tensor, weight_I: torch.Tensor) -> torch.Tensor:
    """Returns the scales to try: identity (row 0), and two families of 20, positive float32 [C, I].

    With r in {1/20, ..., 1}: a**r, and a**r / w**(1-r) (AutoAWQ's "duo scaling"); each divided by sqrt(max * min) so
    that the scales centre on 1. a is the root mean square of each input channel, w that of each column of the weights.
    """
    activation_I, weight_I = _relative_to_mean(activation_I), _relative_to_mean(weight_I)
    ratios_C1 = torch.arange(1, NUM_RATIOS + 1, device=activation_I.device).unsqueeze(1) / NUM_RATIOS
    plain_CI = activation_I**ratios_C1
    duo_CI = plain_CI / weight_I ** (1 - ratios_C1)
    scales_CI = torch.cat([torch.ones_like(activation_I).unsqueeze(0), plain_CI, duo_CI])
    return scales_CI / (scales_CI.amax(1, keepdim=True) * scales_CI.amin(1, keepdim=True)).sqrt()


def _relative_to_mean(values_I: torch.Tensor) -> torch.Tensor:
    """Values over their mean, at least 1e-4: a dead channel gets a finite scale; all ones where every one is dead."""
    mean = values_I.mean()
    return torch.where(mean > 0, (values_I / mean).clamp(min=1e-4), 1.0)


def powers_of_two(scales: torch.Tensor) -> torch.Tensor:
    """Returns the nearest powers of two: folding them is exact in every binary float format."""
    return torch.exp2(scales.log2().round())


def scale_losses(
    weight_OI: torch.Tensor, scales_CI: torch.Tensor, grid: Scheme, moments: InputMoments, ranks: Ranks = ALONE
) -> torch.Tensor:
    """Measures the output error of a weight [O, I] rounded under each candidate scale, float64 [C]; several ranks take
    the candidates in turns, and get all errors in host memory.

    loss(s) = tr(dW (H + P) dW^T) with dW = Q(W diag(s)) diag(s)^-1 - W, H the Gram matrix of the inputs and P from
    `evened_energy`; W is thinned to at most `SEARCH_ROWS` rows.
    """
    weight_OI = weight_OI[:: -(-len(weight_OI) // SEARCH_ROWS)]
    at_once = max(1, GPU_ELEMENTS_AT_ONCE // weight_OI.numel()) if weight_OI.is_cuda else 1
    evened_I = evened_energy(weight_OI, moments.rms_I)

    def losses_of(part_CI: torch.Tensor) -> torch.Tensor:
        differences_COI = grid.scaled_differences(weight_OI, part_CI)
        columns_CI = torch.linalg.vector_norm(differences_COI, dim=1).double().square()
        return moments.loss(differences_COI) + columns_CI @ evened_I

    with fast_matmuls(weight_OI.device):
        together = max(1, ELEMENTS_AT_ONCE // weight_OI.numel())
        losses = side_by_side(losses_of, scales_CI.split(at_once)[ranks.rank :: ranks.size], together)
    if ranks.size == 1:
        return torch.cat(losses)
    return torch.cat(ranks.in_turns([losses_C.cpu() for losses_C in losses], -(-len(scales_CI) // at_once)))


def evened_energy(weight_OI: torch.Tensor, rms_I: torch.Tensor) -> torch.Tensor:
    """Returns the energy that inputs would have if each contributed alike to the output, and the same in all,
    float64 [I]: e_i |w_i|^2 is the mean over i of rms_i^2 |w_i|^2, with w_i the columns.

    Scales are searched as if half of the tokens were such: which channels are quiet only the calibration's texts say
    (docs/decisions/0043). It changes with a channel's scale as the energy itself does.
    """
    columns_I = weight_OI.double().square().sum(0)
    contribution = (rms_I.double().square() * columns_I).mean()
    return contribution / columns_I.clamp(min=LEAST_COLUMN * columns_I.mean() + torch.finfo(torch.float32).tiny)


Judge = Callable[[], tuple[Sequence[torch.Tensor], InputMoments]]
"""Reads some of a group's consumers into memory, with the moments of their input."""


def best_scales(scales_CI: torch.Tensor, judges: Sequence[Judge], grid: Scheme, ranks: Ranks = ALONE) -> torch.Tensor:
    """Returns the candidate under which the consumers' summed output error is least, float32 [I].

    The first candidate is identity, which wins a tie. Judges are called one at a time, spread over all ranks; their
    losses count as often as they have tokens.
    """

    def losses(judge: Judge) -> list[torch.Tensor]:
        weights, moments = judge()
        found = [moments.count * scale_losses(weight_OI, scales_CI, grid, moments) for weight_OI in weights]
        return found if ranks.size == 1 else [losses_C.cpu() for losses_C in found]

    return _best(scales_CI, [one_C for found in ranks.spread(losses, judges) for one_C in found])


def best_for_all(
    scales_CI: torch.Tensor, weights: Sequence[torch.Tensor], moments: InputMoments, grid: Scheme, ranks: Ranks = ALONE
) -> torch.Tensor:
    """Returns what `best_scales` does for a group's only consumers, which every rank has: ranks take the candidates in
    turns."""
    losses = [moments.count * scale_losses(weight_OI, scales_CI, grid, moments, ranks) for weight_OI in weights]
    return _best(scales_CI, losses)


def _best(scales_CI: torch.Tensor, losses: Sequence[torch.Tensor]) -> torch.Tensor:
    losses_C = torch.stack([*losses]).sum(0)
    return scales_CI[losses_C.argmin().unsqueeze(0)].squeeze(0)  # a number would have to come from the GPU


def group_candidates(
    group: ScaleGroup, producer: torch.Tensor, activation_I: torch.Tensor, weight_I: torch.Tensor, exact: bool = False
) -> torch.Tensor:
    """Returns the candidates that can be folded into a group, float32 [C, I]; row 0 is all ones.

    The producer's weight is [O, I], or a norm's [I]; `activation_I` and `weight_I` are the root mean squares of the
    consumers' input channels and of their columns. `exact`: powers of two, as always where the group has followers.
    """
    if group.producer_rows is not None:  # columns fed by one producer row share a scale
        rows_I = torch.tensor(group.producer_rows, device=activation_I.device)
        activation_I, weight_I = (_shared_rms(values_I, rows_I) for values_I in (activation_I, weight_I))
    scales_CI = candidate_scales(activation_I, weight_I)
    if group.followers or exact:  # which stay exact in their storage type that way (docs/decisions/0003)
        scales_CI = powers_of_two(scales_CI)
    elif producer.dim() == 1:
        scales_CI = torch.stack([foldable_scales(scales_I, producer) for scales_I in scales_CI])
    scales_CI[0] = 1
    return scales_CI


@overload
def is_kept(error: float, error_plain: float) -> bool: ...
@overload
def is_kept(error: torch.Tensor, error_plain: torch.Tensor) -> torch.Tensor: ...
def is_kept(error: float | torch.Tensor, error_plain: float | torch.Tensor) -> bool | torch.Tensor:
    """Decides whether a search's proposal is kept, by summed squared output errors: the one rule for all searches.

    False where the errors are not finite.
    """
    return error <= error_plain


def _shared_rms(values_I: torch.Tensor, rows_I: torch.Tensor) -> torch.Tensor:
    """Each column's value replaced by the root mean square over the columns that read the same producer row."""
    num_rows = int(rows_I.max()) + 1
    zeros = torch.zeros(num_rows, device=values_I.device)
    sums = zeros.index_add(0, rows_I, values_I.square())
    counts = zeros.index_add(0, rows_I, torch.ones_like(values_I))
    return (sums / counts.clamp(min=1)).sqrt()[rows_I]


def foldable_scales(scales_I: torch.Tensor, producer_I: torch.Tensor) -> torch.Tensor:
    """Adjusts scales (by less than 2**-8) so that the producer's divided gain is exact in bfloat16, its storage type.

    The gain g is stored as g' = bfloat16(g / s); consumers are multiplied by g / g' instead of s, so rounding g' costs
    nothing. Channels whose gain is 0 keep scale 1.
    """
    stored_I = (producer_I / scales_I).to(torch.bfloat16).float()
    return torch.where(stored_I == 0, 1.0, producer_I / torch.where(stored_I == 0, 1.0, stored_I))
