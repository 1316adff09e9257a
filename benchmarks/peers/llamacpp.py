"""Quantizes with llama.cpp's own programs to Q4_K_M with an imatrix of given tokens.

    python -m benchmarks.peers.llamacpp MODEL TOKENS OUTPUT

Runs in llama.cpp's environment (README.md here), which holds llama-imatrix, llama-quantize and the converter. MODEL is
what `to_bf16 --dtype float32` wrote. Embedding and output head stay float32, as every other peer leaves them.
llama-imatrix reads text: the tokens' own, cut into chunks of the same length again, the first token of each replaced by
BOS.
"""

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.peers.tokens import read_tokens

CONVERTER = Path(sys.prefix) / "llama.cpp"


def convert(model_folder: Path, target: Path) -> None:
    """Writes the model as float32 GGUF with llama.cpp's converter.

    The converter knows pre-tokenizers by the hash of what a tokenizer makes of one text; the small model's tokens are
    its own, but it cuts text as DeepSeek-V3's does.
    """
    sys.path[:0] = [str(CONVERTER), str(CONVERTER / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda *_: "deepseek-v3"
    sys.argv = ["convert", str(model_folder), "--outfile", str(target), "--outtype", "f32"]
    convert_hf_to_gguf.main()


def quantize(model_folder: Path, tokens_NT: torch.Tensor, output: Path) -> None:
    """Converts, collects the imatrix, quantizes; leaves one .gguf and a config.json."""
    scratch = output.with_name(output.name + ".work")
    scratch.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text, plain, imatrix = scratch / "calibration.txt", scratch / "float32.gguf", scratch / "imatrix.gguf"
    text.write_text("".join(tokenizer.decode(row) for row in tokens_NT), encoding="utf-8")
    convert(model_folder, plain)
    programs = Path(sysconfig.get_path("scripts"))
    collect = [programs / "llama-imatrix", "-m", plain, "-f", text, "-o", imatrix, "-c", tokens_NT.shape[1]]
    kept = ["--token-embedding-type", "f32", "--output-tensor-type", "f32"]
    shrink = [programs / "llama-quantize", "--imatrix", imatrix, *kept, plain, output / "model.gguf", "Q4_K_M", "1"]
    for command in ([*collect, "-t", "1", "--no-ppl", "-ngl", "0"], shrink):
        subprocess.run(list(map(str, command)), check=True)
    config = json.loads((model_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gguf"}
    (output / "config.json").write_text(json.dumps(config, indent=2))
    shutil.rmtree(scratch)


def main() -> None:
    """Parses the command line and quantizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    quantize(arguments.model, read_tokens(arguments.tokens), arguments.output)


if __name__ == "__main__":
    main()
