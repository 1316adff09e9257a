"""ggml's own quantizers, called in the library that the package `xllamacpp` carries.

The extension exports ggml's C symbols, and a call releases the GIL, so threads use all cores. Only functions without
structs in their signature are called: that interface has been stable for years.
Reference: ggml.h (`ggml_quantize_chunk`), https://github.com/ggml-org/ggml
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None where xllamacpp is not installed or no longer exports ggml."""
    try:
        import xllamacpp
    except ImportError:
        return None
    loaded = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    if not hasattr(loaded, "ggml_quantize_chunk") or not hasattr(loaded, "ggml_row_size"):
        return None
    loaded.ggml_row_size.restype = ctypes.c_size_t
    loaded.ggml_row_size.argtypes = (ctypes.c_int, ctypes.c_int64)
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    loaded.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, count, count, count, pointer)
    return loaded


def quantize(rows_RI: torch.Tensor, type_name: str, importance_I: torch.Tensor, threads: int = 0) -> torch.Tensor:
    """Quantizes float32 rows [R, I], I a multiple of the type's block, with ggml's C code: uint8 [R, bytes of a row].

    `importance_I`, float32 and positive, weighs each column's squared error; all ones still make ggml take its better
    search. `threads` 0 is one for each core that this process may use.
    """
    from gguf import GGMLQuantizationType

    ggml = library()
    assert ggml is not None
    number, (num_rows, num_columns) = int(GGMLQuantizationType[type_name]), rows_RI.shape
    rows_RI, importance_I = rows_RI.contiguous(), importance_I.contiguous()
    stored = torch.empty(num_rows, ggml.ggml_row_size(number, num_columns), dtype=torch.uint8)
    threads = min(threads or len(os.sched_getaffinity(0)), num_rows)

    def run(first: int, last: int) -> None:
        pointers = (rows_RI[first:].data_ptr(), stored[first:].data_ptr())
        written = ggml.ggml_quantize_chunk(number, *pointers, 0, last - first, num_columns, importance_I.data_ptr())
        assert written == (last - first) * stored.shape[1], f"ggml wrote {written} bytes of {type_name}"

    bounds = [num_rows * part // threads for part in range(threads + 1)]
    if threads == 1:
        run(0, num_rows)
        return stored
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, bounds[:-1], bounds[1:]))
    return stored
