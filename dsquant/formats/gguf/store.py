"""Encodes rows of weights as a GGUF type's bytes, with the best quantizer installed."""

from collections.abc import Collection
from typing import Any

import torch

from dsquant.errors import UsageError
from dsquant.formats.gguf import float_blocks
from dsquant.formats.gguf.types import FLOAT_TYPES, NEED_IMPORTANCES
from dsquant.kernels import code_book_search, code_books, ggml, k_quants

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Types with kernels for a GPU, whose PyTorch references serve where ggml is not installed.
_WITH_KERNELS = (*k_quants.ROW_BLOCKS, *code_books.TYPES)
_BY_GGUF_PY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
_INSTALL = "pip install 'dsquant[gguf]'"


def quantizer_name(on_gpu: bool) -> str:
    """Returns the name of the code that quantizes; jobs with the same name write the same bytes."""
    rest = "ggml (xllamacpp)" if ggml.library() is not None else "PyTorch and gguf-py"
    return f"Triton ({', '.join(_WITH_KERNELS)}), {rest}" if on_gpu else rest


def check_quantizer(type_names: Collection[str], on_gpu: bool, has_importances: bool) -> str | None:
    """Returns a note for the user where ggml is missing but needed for the planned types; raises UsageError where
    nothing installed quantizes to one of them, or one needs importances."""
    needing = () if has_importances else [name for name in NEED_IMPORTANCES if name in type_names]
    if needing:
        raise UsageError(
            f"the types {', '.join(needing)} need to know which columns matter: give --calibration or --imatrix; "
            "IQ3_S, Q2_K and larger types do without"
        )
    own = (*FLOAT_TYPES, *float_blocks.TYPES, *(_WITH_KERNELS if on_gpu else ()))
    quantized = sorted(set(type_names).difference(own))
    if ggml.library() is not None or not quantized:
        return None
    missing = [name for name in quantized if not is_available(name)]
    if missing:
        raise UsageError(f"the types {', '.join(missing)} need ggml's quantizers; install them with: {_INSTALL}")
    ways: dict[str, Collection[str]] = {
        "by dsquant's PyTorch code": k_quants.ROW_BLOCKS,
        "by dsquant's PyTorch code, a hundred times as slowly": code_books.TYPES,
        "by gguf-py, which weighs all columns alike": _BY_GGUF_PY,
    }
    found = {way: [name for name in quantized if name in types] for way, types in ways.items()}
    words = "; ".join(f"{', '.join(names)} {way}" for way, names in found.items() if names)
    return f"ggml's quantizers are not installed: {words}. To have them: {_INSTALL}"


def is_available(type_name: str) -> bool:
    """Returns whether something installed can quantize to a type."""
    return ggml.library() is not None or type_name in (*_WITH_KERNELS, *float_blocks.TYPES, *_BY_GGUF_PY)


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
        weights_I = (weights_I / weights_I.double().mean()).float()
    if type_name in float_blocks.TYPES:
        return float_blocks.quantize(rows_RI, type_name, weights_I, tensor_scale)
    if rows_RI.is_cuda and type_name in _WITH_KERNELS:
        return _by_kernel(rows_RI, type_name, weights_I)
    rows_RI, weights_I = rows_RI.cpu(), weights_I.cpu()
    if ggml.library() is not None:
        return ggml.quantize(rows_RI, type_name, weights_I)
    if type_name in _WITH_KERNELS:
        return _by_kernel(rows_RI, type_name, weights_I)
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return torch.from_numpy(quantize(rows_RI.numpy(), GGMLQuantizationType[type_name]))


def _by_kernel(rows_RI: torch.Tensor, type_name: str, weights_I: torch.Tensor) -> torch.Tensor:
    """By Triton on a GPU, by PyTorch elsewhere."""
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
