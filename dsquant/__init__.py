"""dsquant: quantization and conversion of DeepSeek-R1 and its family.

    import dsquant

    result = dsquant.awq("tiny-r1", output="out")
    result                                # a table in a notebook
    dsquant.gguf("tiny-r1", type="Q4_K_M", output="out-gguf")
    dsquant.evaluate("tiny-r1", "out")    # perplexity, KL divergence, top-1 agreement

Importing this package imports no torch; the first call does.
"""

from dsquant.api import apply_patch, awq, delta, evaluate, gguf, inspect, plan, run, verify
from dsquant.errors import (
    DsquantError,
    GateError,
    InconclusiveError,
    InputError,
    Interrupted,
    PackageError,
    UsageError,
)

__version__ = "0.1.0"
__all__ = [
    "DsquantError",
    "GateError",
    "InconclusiveError",
    "InputError",
    "Interrupted",
    "PackageError",
    "UsageError",
    "apply_patch",
    "awq",
    "delta",
    "evaluate",
    "gguf",
    "inspect",
    "plan",
    "run",
    "verify",
]
