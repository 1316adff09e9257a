"""Runs the Triton kernels in Triton's interpreter, which must be chosen before triton is imported.

Called with the path of a safetensors file that holds `rows` and `importance`; writes what each type became beside it.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path

from safetensors.torch import load_file, save_file

from dsquant.kernels import k_quants, k_quants_triton

if __name__ == "__main__":
    inputs = Path(sys.argv[1])
    tensors = load_file(inputs)
    stored = {
        type_name: k_quants_triton.quantize(tensors["rows"], type_name, tensors["importance"])
        for type_name in k_quants.ROW_BLOCKS
    }
    save_file(stored, inputs.with_name("stored.safetensors"))
