"""Measures a written tiny-r1 on a text, from its stored FP8 weights.

    python scripts/measure_tiny_r1.py dsquant/assets/tiny-r1 heldout-python.txt

prints the perplexity of the next token; the MTP layer's of the token after next; and, to compare that with, what
the text's own counts make of it, which have seen the answers: of single tokens, and of pairs of neighbours.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_r1 import export
from tiny_r1.network import TinyR1
from tokenizers import Tokenizer

PER_BATCH = 8


def main() -> None:
    """Reads, scores, tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    ids = tokenizer.encode(options.text.read_text(encoding="utf-8")).ids
    count = min(options.samples, len(ids) // options.seq_len)
    if count == 0:
        parser.error(f"{options.text} has {len(ids)} tokens, fewer than one sample of {options.seq_len}")
    tokens = torch.tensor(ids[: count * options.seq_len]).view(count, options.seq_len)
    model = TinyR1(export.load_config(options.folder))
    model.load_named_weights(export.load(options.folder))
    losses = measure(model, tokens)
    sys.stdout.write(f"{count} samples of {options.seq_len} tokens\n")
    for name, loss in losses.items():
        sys.stdout.write(f"{name}: perplexity {math.exp(loss):.3f}\n")


@torch.no_grad()
def measure(model: TinyR1, tokens_NT: torch.Tensor) -> dict[str, float]:
    """Mean cross-entropies by what is predicted, and from what."""
    vocabulary = model.model.config.vocab_size
    frequency_V = torch.bincount(tokens_NT.flatten(), minlength=vocabulary).float()
    pairs_VV = torch.bincount((tokens_NT[:, :-1] * vocabulary + tokens_NT[:, 1:]).flatten(), minlength=vocabulary**2)
    pairs_VV = pairs_VV.view(vocabulary, vocabulary).float()
    sums: dict[str, float] = {}
    for batch in tokens_NT.split(PER_BATCH):
        following, after_next = model.logits(batch)
        scores = {
            "next token": (following[:, :-1], batch[:, 1:]),
            "token after next, MTP layer": (after_next[:, :-1], batch[:, 2:]),
            "token after next, counts of pairs": (pairs_VV[batch[:, 1:-1]].log(), batch[:, 2:]),
            "token after next, counts of tokens": (frequency_V.log().expand(*batch[:, 2:].shape, -1), batch[:, 2:]),
        }
        for name, (logits, targets) in scores.items():
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
            sums[name] = sums.get(name, 0.0) + loss * len(batch)
    return {name: total / len(tokens_NT) for name, total in sums.items()}


if __name__ == "__main__":
    main()
