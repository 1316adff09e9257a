"""Encodes rows of weights as a GGUF type's bytes: by dsquant's kernels on a GPU, by ggml on a CPU that has it."""

from collections.abc import Collection
from typing import Any

import torch

from dsquant.errors import UsageError
from dsquant.formats.gguf import float_blocks
from dsquant.formats.gguf.block_bytes import packed
from dsquant.formats.gguf.types import FLOAT_TYPES, NEED_IMPORTANCES
from dsquant.kernels import code_book_search, code_books, ggml, k_quants
from dsquant.schemes import quantized
from dsquant.schemes.ggml_types import BLOCK_TYPES

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Weights that schemes round together: it bounds what that takes beside them on a GPU.
WEIGHTS_AT_ONCE = 2**22
_INSTALL = "pip install 'dsquant[gguf]'"


def quantizer_name(on_gpu: bool) -> str:
    """Returns the name of the code that quantizes; jobs with the same name write the same bytes."""
    return "Triton" if on_gpu else "PyTorch" if ggml.library() is None else "ggml (xllamacpp)"


def check_quantizer(type_names: Collection[str], on_gpu: bool, has_importances: bool) -> str | None:
    """Returns a note for the user where ggml is missing but would be faster for the planned types; raises UsageError
    where one of them needs importances."""
    needing = () if has_importances else [name for name in NEED_IMPORTANCES if name in type_names]
    if needing:
        raise UsageError(
            f"tensors of type {', '.join(needing)} need to know which columns matter: give --calibration or --imatrix; "
            "of files without any, Q2_K is the smallest, then IQ3_S"
        )
    slower = sorted(set(type_names).difference(FLOAT_TYPES, float_blocks.TYPES))
    if on_gpu or ggml.library() is not None or not slower:
        return None
    books = [name for name in slower if name in code_books.TYPES]
    much = f", and a hundred times as slowly for {', '.join(books)}" if books else ""
    return (
        f"ggml's quantizers are not installed: PyTorch code makes {', '.join(slower)}, more slowly{much}; "
        f"to have them: {_INSTALL}"
    )


def stored_rows(
    rows_RI: torch.Tensor, type_name: str, importance_I: torch.Tensor | None, tensor_scale: float = 1.0
) -> torch.Tensor:
    """Stores rows of a weight, float32 [R, I], as uint8 [R, bytes of a row]; I is a multiple of the type's block.

    `importance_I`, float32 [I] and positive, weighs each column's squared error; None weighs all alike. Rows on a GPU
    are quantized there, and stay there, where it has a kernel for the type. NVFP4 is stored in units of the tensor's
    scale.
    """
    if type_name in FLOAT_TYPES:
        return rows_RI.to(_DTYPES[type_name]).contiguous().view(torch.uint8)
    weights_I = torch.ones(rows_RI.shape[1]) if importance_I is None else importance_I
    if type_name in (*code_books.TYPES, *float_blocks.TYPES):  # ggml ends the process where products overflow
        weights_I = _relative(weights_I)
    if type_name in float_blocks.TYPES:
        return float_blocks.quantize(rows_RI, type_name, weights_I, tensor_scale)
    if rows_RI.is_cuda or ggml.library() is None:
        return _by_own_code(rows_RI, type_name, weights_I)
    return ggml.quantize(rows_RI.cpu(), type_name, weights_I.cpu())


def _relative(weights_I: torch.Tensor) -> torch.Tensor:
    return (weights_I / weights_I.double().mean()).float()


def _by_own_code(rows_RI: torch.Tensor, type_name: str, weights_I: torch.Tensor) -> torch.Tensor:
    """By Triton on a GPU, by PyTorch elsewhere."""
    if type_name not in (*k_quants.ROW_BLOCKS, *code_books.TYPES):
        scheme, weights_I = BLOCK_TYPES[type_name], _relative(weights_I).to(rows_RI.device)
        parts = rows_RI.float().split(max(1, WEIGHTS_AT_ONCE // rows_RI.shape[1]))
        return torch.cat([packed(quantized(*scheme.round_plainly(part, weights_I), scheme)) for part in parts])
    kernels: Any = code_book_search if type_name in code_books.TYPES else k_quants
    if rows_RI.is_cuda:
        from dsquant.kernels import code_books_triton, k_quants_triton

        kernels = code_books_triton if type_name in code_books.TYPES else k_quants_triton
    stored: torch.Tensor = kernels.quantize(rows_RI, type_name, weights_I)
    return stored


def decoded_rows(stored: torch.Tensor, type_name: str) -> torch.Tensor:
    """Decodes stored rows, uint8 [R, bytes of a row], to float32 [R, I] on the CPU with gguf-py."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    decoded = dequantize(stored.cpu().contiguous().numpy(), GGMLQuantizationType[type_name])
    return torch.from_numpy(np.array(decoded, dtype=np.float32))
