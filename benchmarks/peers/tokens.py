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
    """Writes the tokens with the given shape."""
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


def halves_of_text(model: Path, text: Path, shapes: tuple[tuple[int, int], tuple[int, int]]) -> list[torch.Tensor]:
    """Calibration windows from the first half of a text, evaluation windows from the second.

    The halves meet at a line's end, so no line is in both. No token is put before a window.

    Args:
        model: folder that holds tokenizer.json.
        text: UTF-8 text.
        shapes: windows and their length, for calibration and for evaluation.

    Returns:
        Two int64 tensors of these shapes.
    """
    from tokenizers import Tokenizer  # not at the top: the peers' runners only read files

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    content = text.read_text(encoding="utf-8")
    middle = content.index("\n", len(content) // 2) + 1
    parts = (content[:middle], content[middle:])
    return [
        spaced_windows(tokenizer.encode(part, add_special_tokens=False).ids, *shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]
