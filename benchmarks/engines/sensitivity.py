"""Whether an output's noise is its weights' own: the same weights, stored as BF16 (for engines of GGUF as Q8_0).

    python -m benchmarks.engines.sensitivity [--work DIR]

takes the outputs that table.py calls sensitive, reads each, stores what it holds as an unquantized checkpoint, and has
the same engine score the same tokens. Where both are as noisy, no kernel and no layout is at fault: rounding has made a
network in which small differences grow.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.engines.bench import ENGINES, make, read, run
from benchmarks.engines.models import FAMILIES, LLAMA_CPP, TRANSFORMERS, VLLM, outputs, save_checkpoint, tokens
from benchmarks.engines.table import SENSITIVE

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def stored_plainly(model: Path, output: Path, folder: Path) -> Path:
    """Stores what an output holds in BF16, as a checkpoint of the original's names."""
    from dsquant.evaluation.opening import open_candidate, open_original

    original = open_original(str(model))
    weights = open_candidate(str(output), original).weights
    names = [name for name in original.checkpoint.weights if name in weights]
    config = json.loads((model / "config.json").read_text())
    if len(names) < len(original.checkpoint.weights):  # GGUF files leave multi-token prediction out
        config["num_nextn_predict_layers"] = 0
    save_checkpoint(folder, config, {name: weights[name].to(torch.bfloat16) for name in names})
    for name in TOKENIZER_FILES:
        if (model / name).exists():
            shutil.copyfile(model / name, folder / name)
    return folder


def noise(engine: str, model: Path, made: Path, folder: Path) -> float:
    """An engine's noise with one output."""
    samples = tokens(model).tolist()
    reading = read(model, {"it": made}, samples)["it"]
    answer = run(ENGINES[engine], {"it": made}, samples, folder / "sensitivity.log")["it"]
    found = [value for sample in answer["log_probabilities"] for value in sample]
    return fmean(abs(one - other) for one, other in zip(found, reading, strict=True))


def compared(family: str, output: str, work: Path) -> str:
    """A row: the noise of an output, and of its weights stored plainly."""
    import dsquant
    from dsquant.formats.gguf.gguf_weights import gguf_file

    known, folder = FAMILIES[family], work / family.split(",")[0].replace(" ", "-").replace("(", "")
    wanted = outputs(known)[output]
    in_gguf = output.startswith("gguf:")
    engine = LLAMA_CPP if in_gguf else next(one for one in (VLLM, TRANSFORMERS) if one in wanted.engines)
    engine = TRANSFORMERS if output.endswith("2 bits") else engine  # vLLM has no kernel on a CPU
    made = make(known, folder, {output: wanted})
    plain = folder / f"plain-{output}".replace(" ", "-").replace(",", "").replace(":", "-")
    shutil.rmtree(plain, ignore_errors=True)
    stored = stored_plainly(made[known.baseline], made[output], plain / "model")
    if in_gguf:
        dsquant.gguf(stored, type="Q8_0", output=plain / "gguf", calibration=None, evaluate=False, progress=False)
        found = gguf_file(plain / "gguf")
        assert found is not None
        stored = found
    model = made[known.baseline]
    both = (noise(engine, model, path, folder) for path in (made[output], stored))
    return f"| {family} | {output} | {engine} | {' | '.join(f'{one:.4f}' for one in both)} |"


def main() -> None:
    """Parses the command line, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="the bench's folder, with the models and outputs that are there")
    arguments = parser.parse_args()
    print("| model | output | engine | noise | of the same weights, unquantized |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for family, output in sorted(SENSITIVE):
            print(compared(family, output, arguments.work or Path(scratch)), flush=True)


if __name__ == "__main__":
    main()
