"""MXFP4 and NVFP4 in GGUF: codes of E2M1 under the scales of least error, packed as ggml stores them.

ggml takes the scale that a block's largest weight asks for; here those around it are tried too, judged by the columns'
importances. NVFP4's blocks are in units of a scale of their matrix, where llama.cpp reads one: a tensor beside it.
Reference for the layouts: `block_mxfp4` and `block_nvfp4` in ggml-common.h, https://github.com/ggml-org/ggml

Shape legend: R rows, I columns, B blocks along I, N blocks that are stored together, S = block size.
"""

import torch

from dsquant.kernels.clipping import clip_losses
from dsquant.kernels.grids import round_rows
from dsquant.schemes.floats import Mxfp4, Nvfp4, e2m1_bits

TYPES = ("MXFP4", "NVFP4")
_WEIGHTS_AT_ONCE = 2**21
_STORED_TOGETHER = {"MXFP4": 1, "NVFP4": 4}


def nvfp4_scale(largest: float) -> float:
    """Returns the scale of an NVFP4 matrix from its largest magnitude: a power of two."""
    return Nvfp4().fitted(torch.tensor([[largest]])).tensor_scale


def quantize(
    rows_RI: torch.Tensor, type_name: str, importance_I: torch.Tensor, tensor_scale: float = 1.0
) -> torch.Tensor:
    """Quantizes float32 rows to a type of `TYPES`: uint8 [R, bytes of a row], on the rows' device."""
    scheme = Mxfp4() if type_name == "MXFP4" else Nvfp4(tensor_scale)
    weights_BSS = importance_I.to(rows_RI).view(-1, scheme.group_size).diag_embed()
    stored = []
    for part_RI in rows_RI.split(max(1, _WEIGHTS_AT_ONCE // rows_RI.shape[1])):
        candidates = scheme.parameters(part_RI, scheme.clip_ratios)
        losses_CRB = clip_losses(part_RI, weights_BSS, candidates, scheme.levels)
        chosen = candidates.chosen(losses_CRB.argmin(0))
        bits_RI = e2m1_bits(round_rows(part_RI, chosen, scheme.levels))
        low, high = bits_RI.unflatten(1, (-1, scheme.group_size)).chunk(2, 2)
        if type_name == "MXFP4":
            scales_RB = (chosen.scales.log2() + 127).round().to(torch.uint8)
        else:
            scales_RB = (chosen.scales / tensor_scale).to(torch.float8_e4m3fn).view(torch.uint8)
        together = (-1, _STORED_TOGETHER[type_name])
        codes_RNX = (low | high << 4).unflatten(1, together).flatten(2)
        stored.append(torch.cat([scales_RB.unflatten(1, together), codes_RNX], 2).flatten(1))
    return torch.cat(stored)
