"""The boundary to a checkpoint's tokenizer and chat template, which are programs that others wrote.

A regular expression that backtracks beyond the tokenizer's own limit ends in a panic of its package, a template may
raise, run for ever or fill the memory: all of it is the checkpoint's fault, and said so.
"""

import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from dsquant.files.foreign import LARGEST_MODEL_TEXT_BYTES, blaming, check_size, find_file
from dsquant.files.strict_json import read_json_object

# Names of the files that tokenizers are read from, whole.
TOKENIZER_FILE = re.compile(r"token|vocab|merges|template|\.jinja|\.model$")
# For one conversation, which takes milliseconds.
TEMPLATE_SECONDS = 10.0
TEMPLATE_BYTES = 2**28
# Limits of the text that a template adds to messages, and of how often it repeats them.
MOST_ADDED, MOST_REPEATED = 2**20, 8
THEN = "take the tokenizer's files from the release that the weights are from"


def check_tokenizer_files(folder: Path) -> None:
    """Raises InputError where a file that a tokenizer may be read from (which ones depends on its class) is not a
    regular file, is a link that leads out of the folder, or is too large."""
    for inside in (".", "additional_chat_templates"):
        for path in sorted((folder / inside).glob("*")):
            there = None if path.is_dir() else find_file(folder, str(path.relative_to(folder)))
            if there is not None and TOKENIZER_FILE.search(path.name):
                check_size(path, LARGEST_MODEL_TEXT_BYTES)


def is_code(folder: Path) -> bool:
    """Returns whether a tokenizer's config names a class in the checkpoint, beside a tokenizer.json that says all."""
    path = find_file(folder, "tokenizer_config.json")
    config = read_json_object(path, most_bytes=LARGEST_MODEL_TEXT_BYTES) if path else {}
    return "auto_map" in config and find_file(folder, "tokenizer.json") is not None


def tokenizer_advice(folder: Path) -> str:
    """Returns what to do where a checkpoint has no tokenizer that can be read."""
    if find_file(folder, "tiktoken.model") is None:
        return "copy the model's tokenizer there"
    return (
        "its tiktoken.model is read by code in the checkpoint, which dsquant does not run: put a tokenizer.json with "
        "the same tokens beside it, as conversions of the model have, or as "
        "transformers.convert_slow_tokenizer.TikTokenConverter makes it"
    )


def encode(text: str, tokenizer: Any, add_special_tokens: bool = True) -> list[int]:
    """Returns a text's tokens, by default with the special ones that the tokenizer is configured to put before and
    after it; raises InputError where the tokenizer fails."""
    with blaming(f"the tokenizer of {_name(tokenizer)}", THEN):
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return tokens


def decode(tokens: Sequence[int], tokenizer: Any) -> str:
    """Turns tokens into text, without special ones; raises InputError where the tokenizer fails."""
    with blaming(f"the tokenizer of {_name(tokenizer)}", THEN):
        text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def render(messages: Sequence[dict[str, str]], tokenizer: Any) -> str:
    """Renders a conversation with the tokenizer's chat template, up to where the model's answer begins; raises
    InputError where the template raises, takes too long or too much memory, or writes far more than it was given."""
    most = MOST_ADDED + MOST_REPEATED * sum(len(message["content"]) for message in messages)
    with blaming(f"the chat template of {_name(tokenizer)}", THEN), _bounded(TEMPLATE_SECONDS, TEMPLATE_BYTES):
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        if len(text) > most:
            raise ValueError(f"it makes {len(text)} characters of a conversation, more than the {most} it may")
    return text


@contextmanager
def _bounded(seconds: float, num_bytes: int) -> Iterator[None]:
    """Bounds the time of what Python runs in the main thread, and the memory that is asked for meanwhile."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took longer than {seconds:g} seconds")

    with _memory_limit(num_bytes):
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
            yield
            return
        before = signal.signal(signal.SIGALRM, stop)
        waiting = signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, *waiting)
            signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory_limit(num_bytes: int) -> Iterator[None]:
    """Lets this process ask for so many bytes more; where the system does not tell what it has, for any number."""
    used = Path("/proc/self/statm")
    if not used.is_file():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(used.read_text().split()[0]) * resource.getpagesize() + num_bytes
    if before[0] != resource.RLIM_INFINITY and before[0] < limit:
        limit = before[0]
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _name(tokenizer: Any) -> str:
    """Where a tokenizer was read from, if it knows."""
    return str(getattr(tokenizer, "name_or_path", "unknown origin"))
