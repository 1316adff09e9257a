"""Codes to 32-bit words, in the layouts of AutoAWQ's GEMM and of compressed-tensors' pack-quantized.

Shape legend: O out features, I in features, B bits of a code.
"""

import math

import torch

from dsquant.kernels.values import WORD_BITS

# AWQ: the columns of eight whose 4-bit codes a word holds, from the lowest bits up (autoawq, `packing_utils`).
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_BITS = 4


def pack_awq(codes_OI: torch.Tensor) -> torch.Tensor:
    """Packs 4-bit codes [O, I], O a multiple of 8, along O in AutoAWQ's GEMM layout: int32 [I, O / 8]."""
    if codes_OI.is_cuda:
        from dsquant.kernels import packing_triton

        return packing_triton.pack_awq(codes_OI)
    return pack_awq_reference(codes_OI)


def pack_awq_reference(codes_OI: torch.Tensor) -> torch.Tensor:
    """`pack_awq` in PyTorch, on any device."""
    codes_IO = codes_OI.T
    words = torch.zeros(len(codes_IO), codes_IO.shape[1] // 8, dtype=torch.int32, device=codes_OI.device)
    for place, column in enumerate(AWQ_COLUMNS):
        words |= codes_IO[:, column::8].to(torch.int32) << (AWQ_BITS * place)
    return words


def pack_rows(codes_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes [O, I] of 1 to 8 bits in compressed-tensors' layout: int32 [O, ceil(I * B / 32)].

    Each row is a dense stream of codes, the first in the lowest bits; a code may straddle two words.
    """
    if codes_OI.is_cuda and WORD_BITS % bits == 0:
        from dsquant.kernels import packing_triton

        return packing_triton.pack_rows(codes_OI, bits)
    return pack_rows_reference(codes_OI, bits)


def pack_rows_reference(codes_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """`pack_rows` in PyTorch, on any device."""
    num_columns = codes_OI.shape[1]
    padded = torch.nn.functional.pad(codes_OI, (0, -num_columns % WORD_BITS)).unflatten(1, (-1, WORD_BITS))
    words = torch.zeros(*padded.shape[:2], bits, dtype=torch.int32, device=codes_OI.device)
    for place in range(WORD_BITS):  # 32 codes fill `bits` words
        word, shift = divmod(place * bits, WORD_BITS)
        code = padded[:, :, place].to(torch.int32)
        words[:, :, word] |= code << shift
        if shift + bits > WORD_BITS:
            words[:, :, word + 1] |= code >> (WORD_BITS - shift)
    return words.flatten(1)[:, : math.ceil(num_columns * bits / WORD_BITS)].contiguous()


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """Undoes `pack_awq`: uint8 [O, I]."""
    codes_IO = torch.empty(len(words), words.shape[1] * 8, dtype=torch.uint8)
    for place, column in enumerate(AWQ_COLUMNS):
        codes_IO[:, column::8] = (words >> (AWQ_BITS * place) & (2**AWQ_BITS - 1)).to(torch.uint8)
    return codes_IO.T.contiguous()


def unpack_rows(words: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """Undoes `pack_rows`: uint8 [O, I]."""
    starts_I = torch.arange(columns) * bits
    place_I, shift_I = starts_I // WORD_BITS, starts_I % WORD_BITS
    parts = []
    for part in words.split(1024):
        low = part.long() & (2**WORD_BITS - 1)
        high = torch.nn.functional.pad(low, (0, 1))[:, 1:]
        pairs = low | (high << WORD_BITS)  # a code may straddle two words
        parts.append(((pairs[:, place_I] >> shift_I) & (2**bits - 1)).to(torch.uint8))
    return torch.cat(parts)
