"""Tokens of a tokenizer that the model does not know: the embedding has no row for them."""

from collections.abc import Iterable, Sequence
from typing import Any

from dsquant.errors import InputError


def set_embedding_rows(tokenizer: Any, rows: int) -> None:
    """Tells a tokenizer how many tokens the model knows: releases add some, for padding mostly, that no text yields."""
    tokenizer.embedding_rows = rows


def surplus_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> token of those that the embedding has no row for."""
    rows = getattr(tokenizer, "embedding_rows", None)
    if rows is None:
        return {}
    return {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}


def surplus_notes(tokenizer: Any) -> list[str]:
    """What to tell of such tokens, in words."""
    surplus = surplus_tokens(tokenizer)
    if not surplus:
        return []
    first = min(surplus)
    words = f"tokens of the tokenizer without a row in the embedding: {len(surplus)}; texts that yield one are refused"
    return [f"{words} (the first is {surplus[first]!r}, id {first})"]


def check_embedded(samples: Iterable[Sequence[int]], tokenizer: Any, text: str) -> None:
    """Refuses tokens that the embedding has no row for.

    Args:
        samples: token ids.
        tokenizer: the model's.
        text: where they come from, for the message.

    Raises:
        InputError: at the first such token.
    """
    rows = getattr(tokenizer, "embedding_rows", None)
    if rows is None:
        return
    # A post-processor may put in ids that the vocabulary does not name.
    found = next((number for sample in samples for number in sample if number >= rows), None)
    if found is not None:
        token = surplus_tokens(tokenizer).get(found, "(not in the vocabulary)")
        raise InputError(
            f"{text}: it yields token {token!r} (id {found}), and tensor 'model.embed_tokens.weight' has only "
            f"{rows} rows; leave it out of the text, or take tokenizer and weights of one release"
        )
