"""The output formats by the name that `--to` gives them."""

from dsquant.writers.awq_gemm import AwqGemm
from dsquant.writers.compressed_tensors import CompressedTensors
from dsquant.writers.protocol import Format

FORMATS: dict[str, Format] = {"awq": AwqGemm(), "compressed-tensors": CompressedTensors()}
