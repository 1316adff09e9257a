"""Lets a model write, in any format that dsquant reads: decoded to float32, with the whole model in memory.

This shows what a quantized model says; an engine is what serves it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dsquant.calibration.tokenizer import encode, render
from dsquant.errors import InputError, UsageError
from dsquant.evaluation.answer_request import AnswerRequest
from dsquant.evaluation.code.drift_plan import too_large
from dsquant.evaluation.code.generation import padding_token, resident_model
from dsquant.evaluation.opening import open_original
from dsquant.jobs.resources import default_memory_budget, resolved_device
from dsquant.source.vocabulary import check_embedded

Message = dict[str, str]
Write = Callable[[str], None]
"""Gets the text as it is generated, in pieces."""


@dataclass(frozen=True)
class Model:
    """A model in memory that can be asked."""

    network: Any
    tokenizer: Any
    request: AnswerRequest
    context: int | None
    """The most tokens that it was made for."""

    def answer(self, messages: Sequence[Message], write: Write = lambda text: None) -> str:
        """Answers the last message of a conversation; raises UsageError where the model has no chat template."""
        self.check_answers()
        return self._generate(encode(render(messages, self.tokenizer), self.tokenizer, add_special_tokens=False), write)

    def check_answers(self) -> None:
        """Raises UsageError where the model has no chat template."""
        if not self.tokenizer.chat_template:
            raise UsageError(
                f"{self.request.model} has no chat template; continue a text with `dsquant generate --raw`"
            )

    def go_on(self, text: str, write: Write = lambda text: None) -> str:
        """Continues a text."""
        return self._generate(encode(text, self.tokenizer), write)

    def _generate(self, prompt: list[int], write: Write) -> str:
        request, tokenizer = self.request, self.tokenizer
        if not prompt:
            raise UsageError("the prompt is empty")
        check_embedded([prompt], tokenizer, "the prompt")
        if self.context is not None and len(prompt) + request.max_tokens > self.context:
            raise UsageError(
                f"the prompt's {len(prompt)} tokens and {request.max_tokens} after it are more than the model's "
                f"context of {self.context}; lower --max-tokens or shorten the prompt"
            )
        written: list[str] = []

        def note(text: str) -> None:
            written.append(text)
            write(text)

        sampling: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            sampling = {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 1.0}
        tokens = torch.tensor([prompt], device=self.network.device)
        with torch.no_grad():
            self.network.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=request.max_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=padding_token(tokenizer, self.network.get_input_embeddings().num_embeddings),
                streamer=_streamer(tokenizer, note),
                **sampling,
            )
        return "".join(written)


@contextmanager
def resident(request: AnswerRequest) -> Iterator[Model]:
    """Loads a model for as long as the block lasts.

    Raises InputError where it cannot be read, or does not fit in memory in float32.
    """
    original = open_original(request.model, torch.device(resolved_device(request.device)))
    budget = default_memory_budget() if request.memory_budget is None else request.memory_budget
    problem = too_large(original, budget)
    if problem is not None:
        raise InputError(f"{request.model}: {problem}; serve it with an engine instead (README, card of the output)")
    torch.manual_seed(request.seed)
    context = original.skeleton.config.get("max_position_embeddings")
    with resident_model(original.skeleton, original.checkpoint.weights) as network:
        yield Model(network, original.tokenizer, request, None if context is None else int(context))


def _streamer(tokenizer: Any, note: Write) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        """Hands text on as soon as no later token can change it."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            note(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
