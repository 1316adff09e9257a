"""MXFP4 in GGUF: codes of E2M1 under the scales of least error, packed as ggml stores them.

ggml takes the exponent of a block's largest weight; here the exponents next to it are tried too, judged by the columns'
importances. Reference for the layout: `block_mxfp4` in ggml-common.h, https://github.com/ggml-org/ggml

Shape legend: R rows, I columns, B blocks along I, S = block size.
"""

import torch

from dsquant.kernels.clipping import clip_losses
from dsquant.kernels.grids import round_rows
from dsquant.schemes.floats import Mxfp4

TYPES = ("MXFP4",)
_ZERO = 7  # the rank of 0 among E2M1's 15 values
_WEIGHTS_AT_ONCE = 2**21


def quantize(rows_RI: torch.Tensor, importance_I: torch.Tensor) -> torch.Tensor:
    """Quantizes float32 rows to MXFP4: uint8 [R, bytes of a row], on the rows' device."""
    weights_BSS = importance_I.to(rows_RI).view(-1, Mxfp4().group_size).diag_embed()
    parts = rows_RI.split(max(1, _WEIGHTS_AT_ONCE // rows_RI.shape[1]))
    return torch.cat([_quantize(part_RI, weights_BSS) for part_RI in parts])


def _quantize(rows_RI: torch.Tensor, weights_BSS: torch.Tensor) -> torch.Tensor:
    scheme = Mxfp4()
    candidates = scheme.parameters(rows_RI, scheme.clip_ratios)
    losses_CRB = clip_losses(rows_RI, weights_BSS, candidates, scheme.levels)
    chosen = candidates.chosen(losses_CRB.argmin(0))
    ranks_RBS = round_rows(rows_RI, chosen, scheme.levels).unflatten(1, (-1, scheme.group_size)).short() - _ZERO
    codes_RBS = (ranks_RBS.abs() + 8 * (ranks_RBS < 0)).to(torch.uint8)
    low, high = codes_RBS.chunk(2, 2)
    exponents_RB1 = (chosen.scales.log2() + 127).round().to(torch.uint8).unsqueeze(2)
    return torch.cat([exponents_RB1, low | high << 4], 2).flatten(1)
