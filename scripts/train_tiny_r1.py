"""Trains the embedded model tiny-r1 and writes it in R1's own layout.

    python scripts/train_tiny_r1.py --output out --tokens 130000000      # about 6 minutes on an H100

writes out/tiny-r1 (with outlier channels) and out/tiny-r1-smooth (the same without), each also as a .tar,
out/heldout-python.txt and out/training.json. See dsquant/assets/tiny-r1/README.md for what came of it.

    python scripts/train_tiny_r1.py --size medium --output out --tokens 400000000 --seconds 250 --parts parts

writes out/medium-r1, four times as large, for benchmarks/quality.py, not shipped; parts/medium-r1.tar.00, .01 ...
are the pieces of one .tar of it and the two files: `cat parts/medium-r1.tar.* | tar x`. smooth_tiny_r1.py makes the
model without outlier channels from it.

    python scripts/train_tiny_r1.py --size deep --output out --tokens 400000000 --seconds 300 --batch 12 --seq-len 2048

writes out/deep-r1, 22 layers and 299M parameters, for benchmarks/deep.py on the same machine: too large to ship.

    python scripts/train_tiny_r1.py --family v3.2 --seq-len 4096 --batch 12 --output out

writes out/tiny-v32 and out/tiny-v32-smooth in DeepSeek-V3.2's layout: the same network, with indexers that are trained
beside it on `--indexer-tokens` more and choose 512 of up to 4,096 keys.
"""

import argparse
import io
import json
import math
import sys
import tarfile
import time
from pathlib import Path

import torch
from tiny_r1 import corpus, experts, export, indexer, tokenizer, training
from tiny_r1.network import DEEP, MEDIUM, SMALL, Config, TinyR1

SIZES = {
    "small": ("tiny-r1", SMALL, 2e-3),
    "medium": ("medium-r1", MEDIUM, 1.5e-3),
    "deep": ("deep-r1", DEEP, 1e-3),
}
"""Size -> folder name, config, highest learning rate."""
FAMILIES = {"r1": "r1", "v3.2": "v32"}
"""Family -> what its folders are called."""
PART_BYTES = 15 * 2**20
SPARSE_SAMPLES = 50
HELD_OUT_TOKENS = 400 * 512
HELD_OUT_CHARS = 1_500_000
LARGEST_CHANGE = 1e-3
# A few tokens tell whether the function is the same; among many, some router would be at a tie.
CHECKED_TOKENS = 256


def main() -> None:
    """Runs all steps."""
    options = _options()
    name, config, rate = SIZES[options.size]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    options.output.mkdir(parents=True, exist_ok=True)

    started = time.monotonic()
    train_texts, held_out, licences = corpus.read(options.chars, options.seed)
    log(f"{len(train_texts)} files to train on, {len(held_out)} held out, {time.monotonic() - started:.0f} s")
    trained = tokenizer.train((text for text in train_texts[:2000]), config["vocab_size"])
    stream, held_out_stream = (encode(trained, texts).to(device) for texts in (train_texts, held_out))
    log(f"{len(stream)} tokens, {len(held_out_stream)} held out, {time.monotonic() - started:.0f} s")

    model = TinyR1(config).to(device)
    log(f"{sum(weight.numel() for weight in model.parameters())} parameters, those of the MTP layer included")
    if device.type == "cuda":
        experts.use_bfloat16_experts(model.model)
    trained_tokens = training.train(
        model, stream, options.tokens, options.batch, options.seq_len, rate, log, options.seconds
    )
    first, second = training.evaluate(model, held_out_stream, options.seq_len, HELD_OUT_TOKENS // options.seq_len)
    log(f"held-out perplexity {math.exp(first):.3f}, of the token after next {math.exp(second):.3f}")

    weights, sparse = model.named_weights(), {}
    if options.family == "v3.2":
        name, config = name.replace(FAMILIES["r1"], FAMILIES["v3.2"]), config | indexer.KEYS
        started_indexers = time.monotonic()
        weights |= indexer.train(
            model, stream, options.indexer_tokens, options.indexer_batch, options.seq_len, log, options.seconds
        )
        sparse = {"perplexity_sparse": sparse_perplexity(config, weights, held_out_stream, options.seq_len)}
        sparse |= {"indexer_seconds": time.monotonic() - started_indexers}
        log(f"held-out perplexity {sparse['perplexity_sparse']:.3f} with {config['index_topk']} keys")
    changed = export.add_outliers(weights, options.seed)
    save(changed, trained, options.output / name, config)
    save(weights, trained, options.output / f"{name}-smooth", config)
    (options.output / "heldout-python.txt").write_text("\n".join(held_out)[:HELD_OUT_CHARS])
    facts = {
        "perplexity_before_fp8": math.exp(first),
        "mtp_perplexity_before_fp8": math.exp(second),
        "tokens": trained_tokens,
        "corpus_tokens": len(stream),
        "seconds": time.monotonic() - started,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        **sparse,
        "packages": licences,
    }
    (options.output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    for folder in (name, f"{name}-smooth"):
        with tarfile.open(options.output / f"{folder}.tar", "w") as archive:
            archive.add(options.output / folder, folder)
    if options.parts:
        pack(options.output, [name, "heldout-python.txt", "training.json"], options.parts / f"{name}.tar")
    # After all is written: what took minutes of a GPU is not lost to a near tie in some router.
    sample = held_out_stream[: min(options.seq_len, CHECKED_TOKENS)].long().cpu().unsqueeze(0)
    difference = largest_difference(SIZES[options.size][1], weights, changed, sample)
    log(f"outlier channels change logits by {difference:.1e} at most")
    if difference > LARGEST_CHANGE:
        raise RuntimeError(f"outlier channels changed the function: logits by {difference}, at most {LARGEST_CHANGE}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--family", choices=FAMILIES, default="r1")
    parser.add_argument("--indexer-tokens", type=int, default=16_000_000)
    parser.add_argument("--indexer-batch", type=int, default=4)
    parser.add_argument("--parts", type=Path, help="folder for a .tar in pieces of 15 MiB")
    parser.add_argument("--seconds", type=float, default=math.inf, help="train no longer, on fewer tokens if need be")
    parser.add_argument("--tokens", type=int, default=130_000_000)
    parser.add_argument("--chars", type=int, default=220_000_000, help="characters of the corpus")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def sparse_perplexity(config: Config, weights: dict[str, torch.Tensor], tokens: torch.Tensor, seq_len: int) -> float:
    """Perplexity on the first samples of a stream, of the network that sees the keys which its indexers choose."""
    model = TinyR1(config)
    model.load_named_weights(weights)
    first, _ = training.evaluate(model.to(tokens.device), tokens, seq_len, SPARSE_SAMPLES)
    return math.exp(first)


def pack(folder: Path, names: list[str], archive: Path) -> None:
    """Writes the named files and folders of a folder as one .tar, cut into pieces ARCHIVE.00, ARCHIVE.01, ..."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name in names:
            tar.add(folder / name, name)
    whole = content.getbuffer()
    for piece, start in enumerate(range(0, len(whole), PART_BYTES)):
        Path(f"{archive}.{piece:02d}").write_bytes(whole[start : start + PART_BYTES])


def encode(trained: tokenizer.Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of tokens: BOS, text, EOS, BOS, ..."""
    parts = []
    for start in range(0, len(texts), 1000):
        for encoding in trained.encode_batch(texts[start : start + 1000]):
            parts.append(torch.tensor([*encoding.ids, 1], dtype=torch.int16))
    return torch.cat(parts)


@torch.no_grad()
def largest_difference(
    config: Config, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], tokens_NT: torch.Tensor
) -> float:
    """How far apart two sets of weights bring any score, the MTP layer's included; float32 on the CPU."""
    model = TinyR1(config)
    scores = []
    for weights in (before, after):
        model.load_named_weights(weights)
        scores.append(model.logits(tokens_NT))
    return max((one - other).abs().max().item() for one, other in zip(*scores, strict=True))


def save(weights: dict[str, torch.Tensor], trained: tokenizer.Tokenizer, folder: Path, config: Config) -> None:
    """Writes a whole model folder."""
    export.save(weights, folder, config)
    tokenizer.save(trained, folder, config["max_position_embeddings"])


def log(line: str) -> None:
    """Tells how far it is."""
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main()
