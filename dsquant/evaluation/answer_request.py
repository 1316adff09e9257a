"""What `dsquant generate` and `dsquant chat` are asked for. Imports no torch."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from dsquant.options import text_of_path
from dsquant.recipes import Device


class AnswerOptions(Device):
    """How a model answers."""

    max_tokens: int = Field(default=256, ge=1, description="The most tokens of an answer.")
    temperature: float = Field(default=0.0, ge=0.0, description="Of the sampling; 0 takes the most likely token.")
    seed: int = Field(default=0, ge=0, description="Of the sampling.")


class AnswerRequest(AnswerOptions):
    """Which model answers, and how."""

    model: Annotated[str, BeforeValidator(text_of_path)] = Field(
        description="A folder, a hub id, tiny-r1, or a GGUF file."
    )
