"""Finds tokens of a tokenizer without a row in the model's embedding."""

from collections.abc import Iterable, Sequence
from typing import Any

from dsquant.errors import InputError


def set_embedding_rows(tokenizer: Any, rows: int) -> None:
    """Stores the number of embedding rows in a tokenizer: releases add tokens, mostly padding, that no text yields."""
    tokenizer.embedding_rows = rows


def surplus_tokens(tokenizer: Any) -> dict[int, str]:
    """Returns id -> token of those without a row in the embedding."""
    rows = getattr(tokenizer, "embedding_rows", None)
    if rows is None:
        return {}
    return {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}


def surplus_notes(tokenizer: Any) -> list[str]:
    """Returns a note on such tokens, or nothing."""
    surplus = surplus_tokens(tokenizer)
    if not surplus:
        return []
    first = min(surplus)
    words = f"tokens of the tokenizer without a row in the embedding: {len(surplus)}; texts with one are refused"
    return [f"{words} (the first is {surplus[first]!r}, id {first})"]


def check_embedded(samples: Iterable[Sequence[int]], tokenizer: Any, text: str) -> None:
    """Refuses samples (token ids) with a token that has no row in the embedding; `text` is their origin, for the
    message. Raises InputError at the first such token."""
    rows = getattr(tokenizer, "embedding_rows", None)
    if rows is None:
        return
    # A post-processor may add ids that are not in the vocabulary.
    found = next((number for sample in samples for number in sample if number >= rows), None)
    if found is not None:
        token = surplus_tokens(tokenizer).get(found, "(not in the vocabulary)")
        raise InputError(
            f"{text}: it yields token {token!r} (id {found}), and tensor 'model.embed_tokens.weight' has only "
            f"{rows} rows; remove it from the text, or use tokenizer and weights of one release"
        )
