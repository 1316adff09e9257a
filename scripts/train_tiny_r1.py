"""Trains the embedded model tiny-r1 and writes it in R1's own layout.

    python scripts/train_tiny_r1.py --output out --tokens 130000000      # about 6 minutes on an H100

writes out/tiny-r1 (with outlier channels) and out/tiny-r1-smooth (the same without), each also as a .tar,
out/heldout-python.txt and out/training.json. See dsquant/assets/tiny-r1/README.md for what came of it.
"""

import argparse
import json
import math
import sys
import tarfile
import time
from pathlib import Path

import torch
from tiny_r1 import corpus, export, tokenizer, training
from tiny_r1.network import CONFIG, TinyR1

HELD_OUT_CHARS = 1_500_000
LARGEST_CHANGE = 1e-3


def main() -> None:
    """Runs all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=130_000_000)
    parser.add_argument("--chars", type=int, default=220_000_000, help="characters of the corpus")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    options.output.mkdir(parents=True, exist_ok=True)

    started = time.monotonic()
    train_texts, held_out, licences = corpus.read(options.chars, options.seed)
    log(f"{len(train_texts)} files to train on, {len(held_out)} held out, {time.monotonic() - started:.0f} s")
    trained = tokenizer.train((text for text in train_texts[:2000]), CONFIG["vocab_size"])
    stream, held_out_stream = (encode(trained, texts).to(device) for texts in (train_texts, held_out))
    log(f"{len(stream)} tokens, {len(held_out_stream)} held out, {time.monotonic() - started:.0f} s")

    model = TinyR1().to(device)
    if device.type == "cuda":
        model.model.set_experts_implementation("grouped_mm")
    training.train(model, stream, options.tokens, options.batch, options.seq_len, 2e-3, log)
    first, second = training.evaluate(model, held_out_stream, options.seq_len, 400)
    log(f"held-out perplexity {math.exp(first):.3f}, of the token after next {math.exp(second):.3f}")

    weights = model.named_weights()
    changed = export.add_outliers(weights, options.seed)
    difference = largest_difference(weights, changed, held_out_stream[: options.seq_len].long().cpu().unsqueeze(0))
    log(f"outlier channels change logits by {difference:.1e} at most")
    if difference > LARGEST_CHANGE:
        raise RuntimeError(f"outlier channels changed the function: logits by {difference}, at most {LARGEST_CHANGE}")
    save(changed, trained, options.output / "tiny-r1")
    save(weights, trained, options.output / "tiny-r1-smooth")
    (options.output / "heldout-python.txt").write_text("\n".join(held_out)[:HELD_OUT_CHARS])
    facts = {
        "perplexity_before_fp8": math.exp(first),
        "mtp_perplexity_before_fp8": math.exp(second),
        "tokens": options.tokens,
        "corpus_tokens": len(stream),
        "seconds": time.monotonic() - started,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "packages": licences,
    }
    (options.output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    for name in ("tiny-r1", "tiny-r1-smooth"):
        with tarfile.open(options.output / f"{name}.tar", "w") as archive:
            archive.add(options.output / name, name)


def encode(trained: tokenizer.Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of tokens: BOS, text, EOS, BOS, ..."""
    parts = []
    for start in range(0, len(texts), 1000):
        for encoding in trained.encode_batch(texts[start : start + 1000]):
            parts.append(torch.tensor([*encoding.ids, 1], dtype=torch.int16))
    return torch.cat(parts)


@torch.no_grad()
def largest_difference(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], tokens_NT: torch.Tensor
) -> float:
    """How far apart two sets of weights bring any score, the MTP layer's included; float32 on the CPU."""
    model = TinyR1()
    scores = []
    for weights in (before, after):
        model.load_named_weights(weights)
        scores.append(model.logits(tokens_NT))
    return max((one - other).abs().max().item() for one, other in zip(*scores, strict=True))


def save(weights: dict[str, torch.Tensor], trained: tokenizer.Tokenizer, folder: Path) -> None:
    """Writes a whole model folder."""
    export.save(weights, folder)
    tokenizer.save(trained, folder, CONFIG["max_position_embeddings"])


def log(line: str) -> None:
    """Tells how far it is."""
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main()
