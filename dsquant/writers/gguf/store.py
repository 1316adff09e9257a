"""Turns rows of weights into a GGUF type's bytes, by the best quantizer that is installed."""

import torch

from dsquant.errors import UsageError
from dsquant.kernels import ggml
from dsquant.writers.gguf.types import FLOAT_TYPES

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def quantizer_name() -> str:
    """Which code quantizes, in words."""
    return "ggml (xllamacpp)" if ggml.library() is not None else "gguf-py"


def check_quantizer(type_names: set[str]) -> None:
    """Refuses types that nothing installed can quantize to.

    Args:
        type_names: the types of the planned tensors.

    Raises:
        UsageError: naming them, and what to install.
    """
    missing = sorted(type_names - set(FLOAT_TYPES) - {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"})
    if ggml.library() is None and missing:
        raise UsageError(
            f"the types {', '.join(missing)} need ggml's quantizers; install them with: pip install 'dsquant[gguf]'"
        )


def stored_rows(rows_RI: torch.Tensor, type_name: str, importance_I: torch.Tensor | None) -> torch.Tensor:
    """Stores rows of a weight.

    Args:
        rows_RI: float32 [R, I].
        type_name: the GGUF type; I is a multiple of its block.
        importance_I: float32 [I], positive, the weight of each column's squared error; None weighs all alike.

    Returns:
        uint8 [R, bytes of a row].
    """
    if type_name in FLOAT_TYPES:
        return rows_RI.to(_DTYPES[type_name]).contiguous().view(torch.uint8)
    if ggml.library() is None:
        return _by_gguf_py(rows_RI, type_name)
    return ggml.quantize(rows_RI, type_name, torch.ones(rows_RI.shape[1]) if importance_I is None else importance_I)


def decoded_rows(stored: torch.Tensor, type_name: str) -> torch.Tensor:
    """Decodes stored rows by gguf-py.

    Args:
        stored: uint8 [R, bytes of a row].
        type_name: their GGUF type.

    Returns:
        float32 [R, I].
    """
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    decoded = dequantize(stored.contiguous().numpy(), GGMLQuantizationType[type_name])
    return torch.from_numpy(np.array(decoded, dtype=np.float32))


def _by_gguf_py(rows_RI: torch.Tensor, type_name: str) -> torch.Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return torch.from_numpy(quantize(rows_RI.numpy(), GGMLQuantizationType[type_name]))
