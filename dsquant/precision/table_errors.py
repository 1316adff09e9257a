"""Measures what it costs at the model's output when embedding or head is stored at one width, the rest unchanged.

Shape legend: N samples, T tokens of a sample, H hidden size, R tokens, V rows of a part of the vocabulary.
"""

from collections.abc import Iterator

import torch

from dsquant.kernels.precision import fast_matmuls
from dsquant.kernels.products import apply_linear
from dsquant.model.activations import Activations
from dsquant.model.gradients import log_sums
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import EMBEDDING, final_norm, head_name, table_parts
from dsquant.precision.allocation import Width
from dsquant.precision.layer_errors import Trial, divergence
from dsquant.source.weights import Weights

# The head's errors are measured on at most this many samples.
HEAD_SAMPLES = 4


def linear_of(table: str) -> str:
    """Returns a table's name among the linears of groups."""
    return table.removesuffix(".weight")


def head_errors(
    skeleton: Skeleton, weights: Weights, hidden: Activations, trial: Trial[Width]
) -> Iterator[tuple[str, Width, float]]:
    """Yields group, width, and the KL divergence that the head's errors cause, summed over all tokens.

    `hidden` are the last hidden states of all samples. The table passes through memory twice, in parts: a prediction's
    divergence is half the variance of its scores' errors (the second order of KL in the scores).
    """
    name = head_name(skeleton)
    for group, (linear,), widths in trial.inside([linear_of(name)]):
        few_NTH = hidden.samples(0, min(HEAD_SAMPLES, hidden.shape[0]))
        with fast_matmuls(weights.device):
            normed_RH = final_norm(skeleton, weights, few_NTH).flatten(0, 1)
            log_sum_R1 = log_sums(skeleton, weights, normed_RH).unsqueeze(1)
            moments = {width: torch.zeros(2, len(normed_RH), device=weights.device) for width in widths}
            for _, table_VH in table_parts(weights, name):
                predicted_RV = apply_linear(normed_RH, table_VH).sub_(log_sum_R1).exp_()
                for width, sums_2R in moments.items():
                    errors_RV = apply_linear(normed_RH, trial.store(group, width, linear, table_VH, None) - table_VH)
                    sums_2R[0] += (predicted_RV * errors_RV).sum(1)
                    sums_2R[1] += (predicted_RV * errors_RV.square_()).sum(1)
        for width, (mean_R, square_R) in moments.items():
            divergence = float((square_R - mean_R.square()).sum(dtype=torch.float64)) / 2
            yield group.name, width, divergence * hidden.num_rows / len(normed_RH)


def embedding_errors(
    weights: Weights, tokens_NT: torch.Tensor, gradients: Activations, trial: Trial[Width]
) -> Iterator[tuple[str, Width, float]]:
    """Yields group, width, and the KL divergence that errors of the embedding cause, summed over all tokens.

    `gradients` are those of the first layer's inputs.
    """
    for group, (linear,), widths in trial.inside([linear_of(EMBEDDING)]):
        tokens_R = tokens_NT.flatten().to(weights.device)
        totals = dict.fromkeys(widths, 0.0)
        for start, table_VH in table_parts(weights, EMBEDDING):
            rows_R = torch.where((tokens_R >= start) & (tokens_R < start + len(table_VH)))[0]
            used_V, place_R = (tokens_R[rows_R] - start).unique(return_inverse=True)
            if not len(used_V):
                continue
            for width in widths:
                errors_VH = trial.store(group, width, linear, table_VH[used_V], None) - table_VH[used_V]
                totals[width] += divergence(errors_VH[place_R], gradients.rows(rows_R))
        yield from ((group.name, width, total) for width, total in totals.items())
