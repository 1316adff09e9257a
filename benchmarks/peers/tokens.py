"""Token files: safetensors with one tensor `tokens`, int64 [N, T]. Every method reads the same file."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def read_tokens(path: Path) -> torch.Tensor:
    """The tokens of a file.

    Raises:
        ValueError: not int64 [N, T].
    """
    tokens_NT = load_file(path)["tokens"]
    if tokens_NT.dtype != torch.int64 or tokens_NT.dim() != 2:
        found = f"{tokens_NT.dtype} {list(tokens_NT.shape)}"
        raise ValueError(f"{path}: tokens are {found}, expected int64 [N, T]")
    return tokens_NT


def write_tokens(tokens_NT: torch.Tensor, path: Path) -> None:
    """Writes the tokens with the given shape; a file that holds them already is left alone."""
    if path.exists() and torch.equal(read_tokens(path), tokens_NT):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": tokens_NT.contiguous()}, path)


def spaced_windows(token_ids: list[int], count: int, length: int) -> torch.Tensor:
    """`count` windows that do not overlap, spread evenly from the first token to the last.

    Raises:
        ValueError: too few tokens.
    """
    if len(token_ids) < count * length:
        raise ValueError(f"{len(token_ids)} tokens of text, expected at least {count} x {length}")
    step = (len(token_ids) - length) // max(count - 1, 1)
    ids = torch.tensor(token_ids, dtype=torch.int64)
    return torch.stack([ids[start : start + length] for start in range(0, count * step, step)][:count])


def chosen_windows(token_ids: list[int], count: int, length: int, seed: int) -> torch.Tensor:
    """`count` windows that do not overlap, chosen at random among all that fit one behind the other.

    Raises:
        ValueError: too few tokens.
    """
    places = len(token_ids) // length
    if places < count:
        raise ValueError(f"{len(token_ids)} tokens of text, expected at least {count} x {length}")
    chosen = torch.randperm(places, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return torch.tensor(token_ids, dtype=torch.int64)[: places * length].view(places, length)[chosen]


def tokens_of(model: Path, text: str) -> list[int]:
    """A text's tokens, none put before it.

    Args:
        model: folder that holds tokenizer.json.
        text: the text.

    Returns:
        Their numbers.
    """
    from tokenizers import Tokenizer  # not at the top: the peers' runners only read files

    return Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def halves(text: Path) -> tuple[str, str]:
    """A UTF-8 text's halves, which meet at a line's end, so that no line is in both."""
    content = text.read_text(encoding="utf-8")
    middle = content.index("\n", len(content) // 2) + 1
    return content[:middle], content[middle:]
