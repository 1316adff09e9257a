"""The output formats by the name that `--to` gives them, up to a colon."""

from difflib import get_close_matches
from typing import Any

from dsquant.errors import UsageError
from dsquant.formats.awq_gemm import AwqGemm
from dsquant.formats.compressed_tensors import CompressedTensors
from dsquant.formats.float4 import CompressedMxfp4, CompressedNvfp4, ModelOptNvfp4
from dsquant.formats.gguf.output import Gguf
from dsquant.formats.gguf.types import MIXTURES
from dsquant.formats.mlx import Mlx
from dsquant.formats.protocol import Format
from dsquant.formats.safetensors import SafetensorsFormat
from dsquant.packages import load

SAFETENSORS: dict[str, SafetensorsFormat[Any]] = {
    "awq": AwqGemm(),
    "compressed-tensors": CompressedTensors(),
    "mlx": Mlx(),
    "nvfp4": CompressedNvfp4(),
    "mxfp4": CompressedMxfp4(),
    "nvfp4-modelopt": ModelOptNvfp4(),
}
FORMATS: dict[str, Format] = {**SAFETENSORS, "gguf": Gguf()}


def format_of(name: str) -> Format:
    """Returns the format of a name such as `awq` or `gguf:Q4_K_M`; raises UsageError where there is none."""
    found = FORMATS.get(name.partition(":")[0])
    if found is None or found.has_types != (":" in name):
        known = (f"{key}:TYPE" if one.has_types else key for key, one in FORMATS.items())
        if name.upper() in MIXTURES:
            near = [f"gguf:{name.upper()}"]
        else:
            near = ["gguf:Q4_K_M"] if name == "gguf" else get_close_matches(name, FORMATS.keys() - {name}, n=1)
        words = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"to: {name!r} is none of {', '.join(known)}{words}")
    return found


def check_decoder(name: str) -> None:
    """Imports the package that decodes a format's output, so that an evaluation at a job's end is not the first to miss
    it; the name may lack its type. Raises PackageError where it cannot be imported."""
    decoder = (FORMATS.get(name) or format_of(name)).decoder
    if decoder is not None:
        load(*decoder)
