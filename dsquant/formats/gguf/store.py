"""Encodes rows of weights as a GGUF type's bytes, with the best quantizer installed."""

from collections.abc import Collection

import torch

from dsquant.errors import UsageError
from dsquant.formats.gguf.types import FLOAT_TYPES
from dsquant.kernels import ggml, k_quants

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BY_GGUF_PY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
_INSTALL = "pip install 'dsquant[gguf]'"


def quantizer_name(on_gpu: bool) -> str:
    """Returns the name of the code that quantizes; jobs with the same name write the same bytes."""
    rest = "ggml (xllamacpp)" if ggml.library() is not None else "PyTorch and gguf-py"
    return f"Triton ({', '.join(k_quants.ROW_BLOCKS)}), {rest}" if on_gpu else rest


def check_quantizer(type_names: Collection[str], on_gpu: bool) -> str | None:
    """Returns a note for the user where ggml is missing but needed for the planned types; raises UsageError where
    nothing installed quantizes to one of them."""
    quantized = sorted(set(type_names) - set(FLOAT_TYPES) - set(k_quants.ROW_BLOCKS if on_gpu else ()))
    if ggml.library() is not None or not quantized:
        return None
    missing = [name for name in quantized if not is_available(name)]
    if missing:
        raise UsageError(f"the types {', '.join(missing)} need ggml's quantizers; install them with: {_INSTALL}")
    own = [name for name in quantized if name in k_quants.ROW_BLOCKS]
    others = [name for name in quantized if name in _BY_GGUF_PY]
    ways = [f"{', '.join(own)} by dsquant's PyTorch code"] if own else []
    ways += [f"{', '.join(others)} by gguf-py, which weighs all columns alike"] if others else []
    return f"ggml's quantizers are not installed: {'; '.join(ways)}. To have them: {_INSTALL}"


def is_available(type_name: str) -> bool:
    """Returns whether something installed can quantize to a type."""
    return ggml.library() is not None or type_name in k_quants.ROW_BLOCKS or type_name in _BY_GGUF_PY


def stored_rows(rows_RI: torch.Tensor, type_name: str, importance_I: torch.Tensor | None) -> torch.Tensor:
    """Stores rows of a weight, float32 [R, I], as uint8 [R, bytes of a row]; I is a multiple of the type's block.

    `importance_I`, float32 [I] and positive, weighs each column's squared error; None weighs all alike. Rows on a GPU
    are quantized there, and stay there, where it has a kernel for the type.
    """
    if type_name in FLOAT_TYPES:
        return rows_RI.to(_DTYPES[type_name]).contiguous().view(torch.uint8)
    weights_I = torch.ones(rows_RI.shape[1]) if importance_I is None else importance_I
    if rows_RI.is_cuda and type_name in k_quants.ROW_BLOCKS:
        from dsquant.kernels import k_quants_triton

        return k_quants_triton.quantize(rows_RI, type_name, weights_I)
    rows_RI, weights_I = rows_RI.cpu(), weights_I.cpu()
    if ggml.library() is not None:
        return ggml.quantize(rows_RI, type_name, weights_I)
    if type_name in k_quants.ROW_BLOCKS:
        return k_quants.quantize(rows_RI, type_name, weights_I)
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return torch.from_numpy(quantize(rows_RI.numpy(), GGMLQuantizationType[type_name]))


def decoded_rows(stored: torch.Tensor, type_name: str) -> torch.Tensor:
    """Decodes stored rows, uint8 [R, bytes of a row], to float32 [R, I] on the CPU with gguf-py."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    decoded = dequantize(stored.cpu().contiguous().numpy(), GGMLQuantizationType[type_name])
    return torch.from_numpy(np.array(decoded, dtype=np.float32))
