"""What the steps of quantization gain on ggml's types: divergence from the original with one type for all linears.

    python -m benchmarks.gguf_steps MODEL --text FILE --held-out FILE --work DIR [--types Q4_K ...] [--steps NAME ...]

Embedding and head stay float32. Calibration takes windows of FILE, evaluation windows of the other file, by dsquant's
own `eval`, which rounds activations as llama.cpp does on a CPU. `ggml` is its quantizer with importances only, `scales`
the same under AWQ's scales. What is finished in DIR is not done again.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import dsquant
from dsquant.pipeline.job import run_job
from dsquant.recipes import Recipe

STEPS = {
    "ggml": ("top-up",),
    "scales": ("scales", "top-up"),
    "compensate": ("compensate", "top-up"),
    "descend": ("compensate", "descend", "top-up"),
    "scales, compensate": ("scales", "compensate", "top-up"),
    "scales, clip, compensate": ("scales", "clip", "compensate", "top-up"),
    "scales, clip, compensate, descend": ("scales", "clip", "compensate", "descend", "top-up"),
    "best": ("scales", "clip", "compensate", "top-up", "follow", "descend"),
}
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q4_0")
MIXTURES = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}


def convert(model: Path, type_name: str, steps: tuple[str, ...], output: Path, options: argparse.Namespace) -> float:
    """Makes the files of one type; returns the seconds that the processors worked."""
    started = time.process_time()
    recipe = Recipe.checked(
        model=model,
        output=output,
        to=[f"gguf:{MIXTURES.get(type_name, type_name)}"],
        preset="compact",
        steps=steps or "none",
        tensor_types=[r"^(token_embd|output)\.weight$=F32", rf".*={type_name}"],
        mtp="drop",
        calibration=(str(options.text),),
        samples=options.samples,
        seq_len=256,
        seed=options.seed,
        evaluate=False,
    )
    run_job(recipe, restart=True)
    return time.process_time() - started


def main() -> None:
    """Makes what is missing, evaluates it, and prints a row for each type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--types", nargs="*", default=list(TYPES))
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--samples", type=int, default=64, help="of 256 tokens, for calibration")
    parser.add_argument("--evaluated", type=int, default=16, help="samples of 512 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tag", default="", help="part of the names of results, for code that has changed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    print(f"| type | {' | '.join(options.steps)} |", flush=True)
    print("|---" * (len(options.steps) + 1) + "|")
    for type_name in options.types:
        found = {}
        for name in options.steps:
            words = (options.tag, options.model.name, type_name, name, options.seed, options.evaluated)
            path = options.work / ("-".join(map(str, words)).replace(", ", "+") + ".json")
            if not path.exists():
                output = path.with_suffix(".gguf")
                seconds = convert(options.model, type_name, STEPS[name], output, options)
                asked = {"texts": [str(options.held_out)], "samples": options.evaluated, "prompts": "none"}
                report = dsquant.evaluate(options.model, output, progress=False, **asked)
                kl = report.candidates[0].mean_kl
                path.write_text(json.dumps({"kl": kl, "seconds": seconds}))
            found[name] = json.loads(path.read_text())
        print(
            f"| {type_name} | {' | '.join('{kl:.5f} ({seconds:.0f} s)'.format(**one) for one in found.values())} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
