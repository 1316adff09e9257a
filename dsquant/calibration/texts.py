"""Texts to tokens: what the statistics are taken on, and the held-out texts that quality is measured on.

A document becomes one BOS, its tokens and one EOS; documents are shuffled, joined and cut into samples of equal length,
so nothing is padded. The same texts, tokenizer and seed give the same tokens on every machine.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsquant.calibration.documents import documents_of, shuffled, split_column, text_sources
from dsquant.calibration.tokenizer import THEN, check_tokenizer_files, encode, is_code, render, tokenizer_advice
from dsquant.errors import InputError, PackageError, UsageError
from dsquant.files.foreign import blaming, find_file, open_file
from dsquant.source.checkpoint import CONFIG_FILE, read_config
from dsquant.source.vocabulary import check_embedded, surplus_tokens

# Files of a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
LONGEST_DOCUMENT = 10**12
# Characters that are encoded at once: a tokenizer takes some 200 bytes of memory for each.
LONGEST_PART = 2**19
THINK, END_THINK = "<think>", "</think>"
HELD_OUT_TEXTS = ("code", "wiki", "reasoning")


@dataclass(frozen=True)
class CalibrationTokens:
    """Calibration samples and where they come from."""

    tokens: torch.Tensor
    """int64 [samples, tokens of a sample]."""
    sha256: str
    """Of the tokens as little-endian int64, after their shape as text."""
    sources: tuple[dict[str, Any], ...]
    """For each source its name and how many samples it gave."""


def load_tokenizer(folder: Path) -> Any:
    """Loads a checkpoint's transformers tokenizer, running no code of it; raises InputError where it cannot be read."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not read_config(folder).get("model_type"):
        raise InputError(
            f"{folder / CONFIG_FILE}: no model_type, by which transformers and engines know a model; take config.json "
            "from the same release as the weights"
        )
    if not any(find_file(folder, name) for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{folder}: no tokenizer.json, tokenizer.model or vocab.json; {tokenizer_advice(folder)}")
    check_tokenizer_files(folder)
    with blaming(f"{folder}: the tokenizer cannot be read", THEN):
        try:
            loader = PreTrainedTokenizerFast if is_code(folder) else AutoTokenizer
            tokenizer = loader.from_pretrained(folder, trust_remote_code=False)
        except ImportError as error:  # sentencepiece, tiktoken, protobuf
            raise PackageError(f"{folder}: this tokenizer needs a package that is missing: {error}") from error
    tokenizer.model_max_length = LONGEST_DOCUMENT  # documents are cut into samples afterwards
    return tokenizer


def check_held_out(tokenizer: Any) -> None:
    """Refuses a tokenizer whose tokens for the shipped held-out texts the embedding has no row for."""
    for text in HELD_OUT_TEXTS if surplus_tokens(tokenizer) else ():
        documents = (part for document in documents_of(f"held-out/{text}/*") for part in _encode(document, tokenizer))
        check_embedded(documents, tokenizer, f"held-out text {text!r} (--no-evaluate does without it)")


def calibration_tokens(
    specs: Sequence[str], tokenizer: Any, num_samples: int, seq_len: int, seed: int
) -> CalibrationTokens:
    """Makes calibration samples, fewer than `num_samples` where the texts do not yield them; `seed` gives the
    documents' order.

    A spec is a text file (.txt, .md, .py and other text), a .jsonl or .parquet file of `records`, perhaps with a
    #COLUMN, a .safetensors file with ready `tokens`, the name of a mix, or `hf:NAME[/CONFIG][:SPLIT][#COLUMN]`; each
    gets an equal share, a mix divides its own. Raises InputError where a source is missing, damaged or empty, or all of
    them yield no sample, UsageError where a spec is none of the above.
    """
    if not specs:
        raise UsageError("calibration names no text; name a file, a mix such as r1-mix, or a hub set as hf:NAME")
    if any(spec.endswith(".safetensors") for spec in specs):
        return _ready_tokens(specs, num_samples, seq_len, tokenizer)
    sources = [source for spec in specs for source in text_sources(spec, 1 / len(specs))]
    wanted = {source: max(1, round(source.share * num_samples)) for source in sources}
    streams = {
        source: _samples(
            shuffled(documents_of(source.spec, dict(source.columns)), seed, source.spec), tokenizer, seq_len
        )
        for source in sources
    }
    found = {source: _take(streams[source], wanted[source]) for source in sources}
    for source in sources:  # what one source lacks, others that have more make up for
        missing = num_samples - sum(len(samples) for samples in found.values())
        found[source] += _take(streams[source], max(0, missing))
    for source in sources:
        check_embedded(found[source], tokenizer, source.spec)
    samples = [(source, sample) for source in sources for sample in found[source]]
    if not samples:
        documents = (document for source in sources for document in documents_of(source.spec, dict(source.columns)))
        length = sum(len(tokens) for document in documents for tokens in _encode(document, tokenizer))
        raise InputError(
            f"{', '.join(specs)}: the texts yield no sample of {seq_len} tokens, they have {length}; give more text "
            "or a smaller --seq-len"
        )
    random.Random(seed).shuffle(samples)
    del samples[num_samples:]
    tokens = torch.tensor([sample for _, sample in samples], dtype=torch.int64)
    taken = Counter(source for source, _ in samples)
    counts = tuple({"name": source.name, "samples": taken[source]} for source in sources)
    return CalibrationTokens(tokens, tokens_sha256(tokens), counts)


def held_out_tokens(text: str, tokenizer: Any, seq_len: int, max_samples: int) -> torch.Tensor:
    """Samples a shipped text that no mix contains (`code`, `wiki` or `reasoning`): int64 [N, seq_len], N at most
    `max_samples`. Raises InputError where it is too short for one sample."""
    documents = documents_of(f"held-out/{text}/*")
    samples = _take(_samples(documents, tokenizer, seq_len), max_samples)
    check_embedded(samples, tokenizer, f"held-out text {text!r}")
    if not samples:
        raise InputError(f"held-out text {text!r} is shorter than one sample of {seq_len} tokens")
    return torch.tensor(samples, dtype=torch.int64)


def text_tokens(text: str, tokenizer: Any, seq_len: int, max_samples: int) -> torch.Tensor:
    """Samples a text to evaluate on, in the order of the text: int64 [N, seq_len], N at most `max_samples`.

    It is a shipped held-out text (`code`, `wiki`, `reasoning`), FILE[#COLUMN], or
    `hf:NAME[/CONFIG][:SPLIT][#COLUMN]`. Raises InputError where it is missing, or too short for one sample.
    """
    if text in HELD_OUT_TEXTS:
        return held_out_tokens(text, tokenizer, seq_len, max_samples)
    if not text.startswith("hf:") and not Path(split_column(text)[0]).expanduser().is_file():
        raise InputError(f"--text {text!r}: no such file, and none of the shipped texts {', '.join(HELD_OUT_TEXTS)}")
    found = 0

    def counted() -> Iterator[Any]:
        nonlocal found
        for document in documents_of(text):
            found += sum(map(len, _encode(document, tokenizer)))
            yield document

    samples = _take(_samples(counted(), tokenizer, seq_len), max_samples)
    check_embedded(samples, tokenizer, f"--text {text!r}")
    if not samples:
        raise InputError(
            f"--text {text!r}: it has {found} tokens with those that begin and end a document, a sample needs "
            f"{seq_len}; give more text or a smaller --seq-len"
        )
    return torch.tensor(samples, dtype=torch.int64)


def tokens_sha256(tokens: torch.Tensor) -> str:
    """SHA-256 of tokens as little-endian int64, after their shape as text."""
    content = str(tuple(tokens.shape)).encode() + tokens.numpy().astype("<i8").tobytes()
    return hashlib.sha256(content).hexdigest()


def _ready_tokens(specs: Sequence[str], num_samples: int, seq_len: int, tokenizer: Any) -> CalibrationTokens:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if len(specs) > 1:
        raise UsageError(f"a .safetensors file of tokens cannot be mixed with other texts: {', '.join(specs)}")
    open_file(Path(specs[0])).close()  # before the package waits for a named pipe
    try:
        tokens = load_file(specs[0])["tokens"]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{specs[0]}: no safetensors file with a tensor 'tokens': {error}") from error
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        found = f"{tokens.dtype} {list(tokens.shape)}"
        raise InputError(f"{specs[0]}: 'tokens' must be int64 [samples, tokens of a sample], found {found}")
    tokens = tokens[:num_samples, :seq_len].to(torch.int64).contiguous()
    if not tokens.numel() or int(tokens.min()) < 0 or int(tokens.max()) >= len(tokenizer):
        raise InputError(f"{specs[0]}: 'tokens' is empty or holds numbers outside 0..{len(tokenizer) - 1}")
    check_embedded(tokens.tolist(), tokenizer, specs[0])
    return CalibrationTokens(tokens, tokens_sha256(tokens), ({"name": Path(specs[0]).name, "samples": len(tokens)},))


def _samples(documents: Iterator[Any], tokenizer: Any, seq_len: int) -> Iterator[list[int]]:
    """Documents packed into samples; what is left at the end is dropped."""
    waiting: list[int] = []
    for document in documents:
        for tokens in _encode(document, tokenizer):
            waiting += tokens
            whole = len(waiting) - len(waiting) % seq_len
            yield from (waiting[start : start + seq_len] for start in range(0, whole, seq_len))
            waiting = waiting[whole:]


def _take(samples: Iterator[list[int]], count: int) -> list[list[int]]:
    return [sample for _, sample in zip(range(count), samples, strict=False)]


def _encode(document: Any, tokenizer: Any) -> Iterator[list[int]]:
    """Yields one BOS, the document, one EOS, as far as the tokenizer has them; the document in parts."""
    text = document if isinstance(document, str) else render_chat(document, tokenizer)
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    text = text.removeprefix(bos).removesuffix(eos)
    yield [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for part in _parts(text):
        yield encode(part, tokenizer, add_special_tokens=False)
    yield [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _parts(text: str) -> Iterator[str]:
    """Splits a text where a line or a word begins."""
    start = 0
    while len(text) - start > LONGEST_PART:
        cut = max(text.rfind(space, start + 1, start + LONGEST_PART) for space in "\n ")
        end = cut if cut > start else start + LONGEST_PART
        yield text[start:end]
        start = end
    yield text[start:]


def render_chat(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """Renders a conversation up to its last assistant turn as the model would have produced it; messages have `role`,
    `content` and, the assistant's, perhaps `reasoning_content`.

    R1's template deletes everything before </think> from assistant turns, so the last turn is not given to it: the
    template renders the conversation before it with the generation prompt, and reasoning and answer follow.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    if last == len(messages) or not tokenizer.chat_template:
        return "\n\n".join(_whole_turn(message) for message in messages)
    if "tool" not in str(tokenizer.chat_template):
        messages = [message | {"role": "user"} if message["role"] == "tool" else message for message in messages]
    prompt = render(messages[:last], tokenizer)
    opened = prompt.rstrip().endswith(THINK)
    if opened:
        prompt = prompt.rstrip().removesuffix(THINK)
    return prompt + _whole_turn(messages[last]) + (tokenizer.eos_token or "")


def _whole_turn(message: dict[str, str]) -> str:
    reasoning = message.get("reasoning_content")
    return f"{THINK}\n{reasoning}\n{END_THINK}\n\n{message['content']}" if reasoning else message["content"]
