"""y = x W^T with W in 4 bits: AutoAWQ's GEMM layout, and compressed-tensors' symmetric pack-quantized layout.

W's values are exact, `scale * (code - zero point)` in float32, except that on a GPU many rows of a 16-bit x meet W
rounded to x's type once.

Shape legend: M rows of x, O out features, I in features, G groups along I.
"""

import torch

from dsquant.kernels.packing import AWQ_BITS, AWQ_COLUMNS
from dsquant.kernels.values import WORD_BITS

MIDDLE = 8


def matmul_awq(
    inputs_MI: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales_GO: torch.Tensor
) -> torch.Tensor:
    """Multiplies by a weight in AutoAWQ's GEMM layout.

    Args:
        inputs_MI: x, bfloat16, float16 or float32 [M, I].
        qweight: int32 [I, O / 8].
        qzeros: int32 [G, O / 8]; on a GPU groups of 16, 32, 64 or 128.
        scales_GO: [G, O].

    Returns:
        [M, O] of x's type, summed in float32.
    """
    if inputs_MI.is_cuda:
        from benchmarks import w4a16_triton

        return w4a16_triton.matmul_awq(inputs_MI, qweight, qzeros, scales_GO)
    return matmul_awq_reference(inputs_MI, qweight, qzeros, scales_GO)


def matmul_awq_reference(
    inputs_MI: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales_GO: torch.Tensor
) -> torch.Tensor:
    """`matmul_awq` in PyTorch, on any device.

    Args:
        inputs_MI: as for `matmul_awq`.
        qweight: as for `matmul_awq`.
        qzeros: as for `matmul_awq`.
        scales_GO: as for `matmul_awq`.

    Returns:
        As `matmul_awq`.
    """
    group_size = len(qweight) // len(qzeros)
    zeros_IO = _unpack_columns(qzeros).repeat_interleave(group_size, 0)
    weight_IO = (_unpack_columns(qweight) - zeros_IO) * scales_GO.float().repeat_interleave(group_size, 0)
    return (inputs_MI.float() @ weight_IO).to(inputs_MI.dtype)


def matmul_pack_quantized(inputs_MI: torch.Tensor, packed: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
    """Multiplies by a symmetric 4-bit weight in compressed-tensors' layout.

    Args:
        inputs_MI: x, bfloat16, float16 or float32 [M, I].
        packed: int32 [O, I / 8].
        scales_OG: [O, G]; on a GPU groups of 16, 32, 64 or 128.

    Returns:
        [M, O] of x's type, summed in float32.
    """
    if inputs_MI.is_cuda:
        from benchmarks import w4a16_triton

        return w4a16_triton.matmul_pack_quantized(inputs_MI, packed, scales_OG)
    return matmul_pack_quantized_reference(inputs_MI, packed, scales_OG)


def matmul_pack_quantized_reference(
    inputs_MI: torch.Tensor, packed: torch.Tensor, scales_OG: torch.Tensor
) -> torch.Tensor:
    """`matmul_pack_quantized` in PyTorch, on any device.

    Args:
        inputs_MI: as for `matmul_pack_quantized`.
        packed: as for `matmul_pack_quantized`.
        scales_OG: as for `matmul_pack_quantized`.

    Returns:
        As `matmul_pack_quantized`.
    """
    shifts = torch.arange(0, WORD_BITS, AWQ_BITS, device=packed.device)
    codes_OI = ((packed.unsqueeze(-1) >> shifts) & 15).flatten(1)
    group_size = codes_OI.shape[1] // scales_OG.shape[1]
    weight_OI = (codes_OI - MIDDLE) * scales_OG.float().repeat_interleave(group_size, 1)
    return (inputs_MI.float() @ weight_OI.T).to(inputs_MI.dtype)


def _unpack_columns(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, columns / 8] to the codes, [rows, columns]."""
    places = torch.tensor(AWQ_COLUMNS, device=words.device).argsort()
    return ((words.unsqueeze(-1) >> (places * AWQ_BITS)) & 15).flatten(1)
