"""dsquant: quantization and conversion of DeepSeek-R1 and its family.

    import dsquant

    result = dsquant.awq("tiny-r1", output="out")
    result                                # a table in a notebook
    dsquant.gguf("tiny-r1", type="Q4_K_M", output="out-gguf")
    dsquant.evaluate("tiny-r1", "out")    # perplexity, KL divergence, top-1 agreement

Importing this package imports no torch; the first call does.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from dsquant.errors import (
    DsquantError,
    GateError,
    InconclusiveError,
    InputError,
    Interrupted,
    PackageError,
    UsageError,
)

if TYPE_CHECKING:
    from dsquant.api import apply_patch, awq, delta, evaluate, generate, gguf, inspect, plan, run, verify

__version__ = "0.1.0.dev4"
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
    "generate",
    "gguf",
    "inspect",
    "plan",
    "run",
    "verify",
]

if "torch" not in sys.modules:  # which reads these when it is imported; what the user has set stays
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared machine, waiting threads must not spin
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # a large tensor's first touch costs a third in huge pages
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # a budget has no room for gaps


def __getattr__(name: str) -> Any:
    """Imports the functions when one is asked for: the command line needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dsquant import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
