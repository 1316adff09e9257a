"""The output formats by the name that `--to` gives them."""

from dsquant.formats.awq_gemm import AwqGemm
from dsquant.formats.compressed_tensors import CompressedTensors
from dsquant.formats.protocol import Format

FORMATS: dict[str, Format] = {"awq": AwqGemm(), "compressed-tensors": CompressedTensors()}
