"""The search for AWQ's scales (Lin et al., AWQ, arXiv 2306.00978, section 3.2), on Gram matrices.

Shape legend: C candidates, O out features, I in features.
"""

import torch

from dsquant.awq.statistics import InputMoments
from dsquant.rounding import Grid, fake_quantize

NUM_RATIOS = 20
# The scale search reads at most this many rows of a weight, evenly spaced: the loss is a sum over rows.
SEARCH_ROWS = 512


def candidate_scales(activation_I: torch.Tensor, weight_I: torch.Tensor) -> torch.Tensor:
    """The scales to try: identity, and two families of 20.

    With r in {1/20, ..., 1}: a**r, and a**r / w**(1-r) (AutoAWQ's "duo scaling"); each divided by sqrt(max * min) so
    that the scales centre on 1.

    Args:
        activation_I: a, the root mean square of each input channel, [I].
        weight_I: w, the root mean square of each column of the weights that read it, [I].

    Returns:
        float32 [C, I], positive; row 0 is all ones.
    """
    activation_I = activation_I.clamp(min=1e-4 * float(activation_I.mean()) + 1e-30)
    weight_I = weight_I.clamp(min=1e-4 * float(weight_I.mean()) + 1e-30)
    ratios_C1 = torch.arange(1, NUM_RATIOS + 1).unsqueeze(1) / NUM_RATIOS
    plain_CI = activation_I**ratios_C1
    duo_CI = plain_CI / weight_I ** (1 - ratios_C1)
    scales_CI = torch.cat([torch.ones_like(activation_I).unsqueeze(0), plain_CI, duo_CI])
    return scales_CI / (scales_CI.amax(1, keepdim=True) * scales_CI.amin(1, keepdim=True)).sqrt()


def scale_losses(
    weight_OI: torch.Tensor, scales_CI: torch.Tensor, grid: Grid, moments: InputMoments
) -> torch.Tensor:
    """The output error of a weight rounded under each candidate scale.

    loss(s) = tr(dW H dW^T) with dW = Q(W diag(s)) diag(s)^-1 - W and H the Gram matrix of the inputs; W is thinned to
    at most `SEARCH_ROWS` rows.

    Args:
        weight_OI: float32 [O, I].
        scales_CI: the candidates.
        grid: the quantization grid.
        moments: the inputs' moments.

    Returns:
        float64 [C].
    """
    weight_OI = weight_OI[:: -(-len(weight_OI) // SEARCH_ROWS)]
    losses = [
        moments.loss((fake_quantize(weight_OI * scales_I, grid) / scales_I).sub_(weight_OI)) for scales_I in scales_CI
    ]
    return torch.tensor(losses, dtype=torch.float64)


def foldable_scales(scales_I: torch.Tensor, producer_I: torch.Tensor) -> torch.Tensor:
    """Adjusts scales so that the producer's divided gain is exact in bfloat16, its storage type.

    The gain g is stored as g' = bfloat16(g / s); consumers are multiplied by g / g' instead of s, so rounding g' costs
    nothing. Channels whose gain is 0 keep scale 1.

    Args:
        scales_I: the wanted scales, float32 [I].
        producer_I: g, float32 [I].

    Returns:
        float32 [I], within 2**-8 of the wanted scales.
    """
    stored_I = (producer_I / scales_I).to(torch.bfloat16).float()
    return torch.where(stored_I == 0, 1.0, producer_I / torch.where(stored_I == 0, 1.0, stored_I))
