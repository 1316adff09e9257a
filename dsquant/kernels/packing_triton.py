"""`packing` on a GPU.

Shape legend: O out features, I in features, W words, P codes of a word, R rows and C columns of a program.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from dsquant.kernels.values import WORD_BITS

AWQ_WORDS = 32
AWQ_ROWS = 64
WORDS = 256
WARPS = 4
W: tl.constexpr = tl.constexpr(WORDS)
AWQ_W: tl.constexpr = tl.constexpr(AWQ_WORDS)
AWQ_R: tl.constexpr = tl.constexpr(AWQ_ROWS)


def pack_awq(codes_OI: torch.Tensor) -> torch.Tensor:
    """`packing.pack_awq` on the codes' GPU."""
    codes_OI = codes_OI.contiguous()
    num_words, num_columns = codes_OI.shape[0] // 8, codes_OI.shape[1]
    words_IW = torch.empty(num_columns, num_words, dtype=torch.int32, device=codes_OI.device)
    programs = (triton.cdiv(num_columns, AWQ_ROWS), triton.cdiv(num_words, AWQ_WORDS))
    _pack_awq[programs](codes_OI, words_IW, num_columns, num_words, num_warps=WARPS)
    return words_IW


def pack_rows(codes_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """`packing.pack_rows` on the codes' GPU, of codes whose bits divide 32."""
    codes_OI = codes_OI.contiguous()
    num_rows, num_columns = codes_OI.shape
    row_words = triton.cdiv(num_columns * bits, WORD_BITS)
    words_OW = torch.empty(num_rows, row_words, dtype=torch.int32, device=codes_OI.device)
    shape = (num_columns, words_OW.numel(), WORD_BITS // bits)
    _pack_rows[triton.cdiv(words_OW.numel(), WORDS),](codes_OI, words_OW, *shape, num_warps=WARPS)
    return words_OW


@triton.jit
def _pack_awq(codes, words, num_columns, num_words):
    columns_R = tl.program_id(0) * AWQ_R + tl.arange(0, AWQ_R)
    words_W = tl.program_id(1) * AWQ_W + tl.arange(0, AWQ_W)
    places_P = tl.arange(0, 8)
    rows_WP = words_W[:, None] * 8 + ((places_P % 4) * 2 + places_P // 4)[None, :]
    codes_WPR = rows_WP.to(tl.int64)[:, :, None] * num_columns + columns_R[None, None, :]
    inside_WPR = (words_W < num_words)[:, None, None] & (columns_R < num_columns)[None, None, :]
    codes_WPR = tl.load(codes + codes_WPR, mask=inside_WPR, other=0).to(tl.int32)
    packed_RW = tl.trans(tl.sum(codes_WPR << (places_P * 4)[None, :, None], 1))
    inside_RW = (columns_R < num_columns)[:, None] & (words_W < num_words)[None, :]
    tl.store(words + columns_R.to(tl.int64)[:, None] * num_words + words_W[None, :], packed_RW, mask=inside_RW)


@triton.jit
def _pack_rows(codes, words, num_columns, num_words, P: tl.constexpr):
    row_words = tl.cdiv(num_columns, P)
    words_W = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    inside_W = words_W < num_words
    places_P = tl.arange(0, P)
    columns_WP = ((words_W % row_words) * P)[:, None] + places_P[None, :]
    places_WP = (words_W // row_words * num_columns)[:, None] + columns_WP
    inside_WP = inside_W[:, None] & (columns_WP < num_columns)
    codes_WP = tl.load(codes + places_WP, mask=inside_WP, other=0).to(tl.int32)
    tl.store(words + words_W, tl.sum(codes_WP << (places_P * (32 // P))[None, :], 1), mask=inside_W)
