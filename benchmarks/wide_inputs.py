"""What it costs that inputs can be too wide for a Gram matrix of each expert's own, measured where they are not.

    python -m benchmarks.wide_inputs MODEL --text FILE --wiki FILE [--seeds 0 1] [--presets quality compact]

MODEL is a small mixture whose hidden size is larger than its experts' width. It is quantized three times: with each
expert's own Gram matrix; as if the hidden size were too wide for that, as R1's is, so that gate and up share their
layer's; and with what is wide clipped only. Tokens, texts and evaluator are those of benchmarks/quality.py.
"""

import argparse
import json
import tempfile
from pathlib import Path
from unittest.mock import patch

import dsquant
from benchmarks.peers.reference import Evaluator
from benchmarks.peers.tokens import chosen_windows, halves, spaced_windows, tokens_of, write_tokens
from benchmarks.quality import CALIBRATION_SHAPE, EVALUATION_SHAPE
from dsquant.quantization import layer_mlps, statistics
from dsquant.quantization.layer_job import LayerJob


def quantize(way: str, model: Path, output: Path, tokens: Path, preset: str) -> None:
    """One run: of `own`, `shared` or `clipped`."""
    config = json.loads((model / "config.json").read_text())
    narrow = statistics.WIDEST_GRAM if way == "own" else config["hidden_size"] - 1
    compensates, shared = LayerJob.compensates, layer_mlps.shared_inverses
    if way == "clipped":
        compensates, shared = lambda job, linear: False, lambda job, scales: [() for _ in scales]
    with (
        patch.object(statistics, "WIDEST_GRAM", narrow),
        patch.object(LayerJob, "compensates", compensates),
        patch.object(layer_mlps, "shared_inverses", shared),
    ):
        dsquant.awq(
            model, output=output, preset=preset, to="compressed-tensors", symmetric=True, calibration=str(tokens),
            evaluate=False, progress=False,
        )  # fmt: skip


def main() -> None:
    """Quantizes, evaluates and prints a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--wiki", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=CALIBRATION_SHAPE[0])
    parser.add_argument("--presets", nargs="+", default=["quality", "compact"])
    options = parser.parse_args()
    calibration, evaluation = halves(options.text)
    texts = {"code": evaluation, "wiki": options.wiki.read_text(encoding="utf-8")}
    evaluator = Evaluator(
        options.model,
        {name: spaced_windows(tokens_of(options.model, text), *EVALUATION_SHAPE) for name, text in texts.items()},
    )
    print("| preset | seed | way | code: mean KL | wiki: mean KL |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.safetensors"
        for seed in options.seeds:
            shape = (options.samples, CALIBRATION_SHAPE[1])
            write_tokens(chosen_windows(tokens_of(options.model, calibration), *shape, seed), tokens)
            for preset in options.presets:
                for way in ("own", "shared", "clipped"):
                    output = Path(folder) / f"{seed}-{preset}-{way}"
                    quantize(way, options.model, output, tokens, preset)
                    found = evaluator.of_folder(output)
                    cells = " | ".join(f"{figures.mean_kl:.4f}" for figures in found.values())
                    print(f"| {preset} | {seed} | {way} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
