"""The output formats by the name that `--to` gives them, up to a colon."""

from dsquant.formats.awq_gemm import AwqGemm
from dsquant.formats.compressed_tensors import CompressedTensors
from dsquant.formats.gguf.output import Gguf
from dsquant.formats.protocol import Format
from dsquant.formats.safetensors import SafetensorsFormat

SAFETENSORS: dict[str, SafetensorsFormat] = {"awq": AwqGemm(), "compressed-tensors": CompressedTensors()}
FORMATS: dict[str, Format] = {**SAFETENSORS, "gguf": Gguf()}


def format_of(name: str) -> Format:
    """The format that a name of `--to` means, such as `gguf:Q4_K_M`."""
    return FORMATS[name.partition(":")[0]]
