"""Types of the tensors of a GGUF file, and the names of llama.cpp's mixtures of them."""

import re
from collections.abc import Sequence
from functools import cache

from dsquant.errors import UsageError

TYPES = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
    "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4",
)  # fmt: skip
FLOAT_TYPES = ("F32", "F16", "BF16")
# Types that are not for columns that all count alike: llama-quantize refuses them without an importance matrix.
NEED_IMPORTANCES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
# Value of `--type`, which is llama.cpp's name for the mixture -> the type of most tensors.
MIXTURES = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0",
    "Q5_1": "Q5_1", "Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q4_K_M+": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K",
    "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_M", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S",
    "IQ3_XXS": "IQ3_XXS", "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S", "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS", "MXFP4_MOE": "MXFP4", "NVFP4": "NVFP4",
}  # fmt: skip
# The type that takes a row whose length is not a multiple of a block of 256.
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_FALLBACKS |= dict.fromkeys((name for name in TYPES if name.startswith("IQ") and name != "IQ4_NL"), "IQ4_NL")
_FALLBACKS["NVFP4"] = "IQ4_NL"
# Tensors whose scale, that NVFP4's blocks are in units of, llama.cpp multiplies with in every architecture; elsewhere
# such as in DeepSeek's MLPs it reads the scale and leaves it out.
_SCALED = re.compile(r"\.attn_output\.weight$")
# Types that a target chooses from, from the fewest bits to the most.
CANDIDATES = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K",
    "Q6_K", "Q8_0",
)  # fmt: skip


@cache
def block_of(type_name: str) -> tuple[int, int]:
    """Returns a block's weights and bytes, from gguf-py."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]


TARGET_KEY = "dsquant.target"
"""The key that says for which target a file's types were chosen: its number of a mixture says little then."""


def file_type_of(mixture: str) -> int:
    """Returns the number of a mixture, a key of `MIXTURES`, in `general.file_type`, from gguf-py."""
    from gguf import LlamaFileType

    name = mixture.removesuffix("+")
    return LlamaFileType[f"ALL_{name}" if name == "F32" else f"MOSTLY_{name}"].value


def row_bytes(type_name: str, columns: int) -> int:
    block, size = block_of(type_name)
    return columns // block * size


def scale_beside(tensor: str, type_name: str) -> str | None:
    """Returns the name of the tensor that holds the scale of another, one number for each of its matrices; None where
    there is none."""
    return f"{tensor.removesuffix('weight')}scale" if type_name == "NVFP4" and _SCALED.search(tensor) else None


def parse_overrides(texts: Sequence[str]) -> list[tuple[re.Pattern[str], str]]:
    """Parses `--tensor-type REGEX=TYPE`, in order: the first pattern found in a tensor's name counts.

    Raises UsageError where one is not of that form, its type unknown or its pattern not a regular expression.
    """
    overrides = []
    for text in texts:
        pattern, separator, type_name = text.rpartition("=")
        if not separator or not pattern or type_name.upper() not in TYPES:
            raise UsageError(f"--tensor-type {text!r}: write REGEX=TYPE with a type of {', '.join(TYPES)}")
        try:
            overrides.append((re.compile(pattern), type_name.upper()))
        except re.error as error:
            raise UsageError(f"--tensor-type {text!r}: {pattern!r} is no regular expression: {error}") from error
    return overrides


def fitting_type(wanted: str, columns: int) -> str:
    """Returns the wanted type where rows of so many columns fit it; else its fallback, or F16 where that does not fit
    either."""
    fitting = (name for name in (wanted, _FALLBACKS.get(wanted, "F16")) if columns % block_of(name)[0] == 0)
    return next(fitting, "F16")
