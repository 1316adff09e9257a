"""Peak resident memory of `dsquant awq` or `dsquant gguf` on one mixture layer of R1's width, measured by the kernel.

    python benchmarks/r1_width.py --folder /tmp/r1-width --experts 64 --memory-budget 6GiB
    python benchmarks/r1_width.py --folder /tmp/r1-width --experts 256 --memory-budget 2GiB --gguf Q4_K_M

makes a checkpoint of one layer with R1's own shapes (hidden 7168, 128 heads, experts of 2048, FP8 128x128), runs the
command on it as a user would, and prints what `getrusage` says of that process. Weights are random: this measures
memory, not quality.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TINY_R1 = Path(__file__).parent.parent / "dsquant" / "assets" / "tiny-r1"
BLOCK = 128
GROUPS = 8
HIDDEN, HEADS, QUERY, LATENT, NOPE, ROPE, VALUE, WIDTH, DENSE_WIDTH = 7168, 128, 1536, 512, 128, 64, 128, 2048, 18432


def config(experts: int, layers: int, dense: int) -> dict[str, Any]:
    """R1's config with few layers, the first of them dense, fewer experts and tiny-r1's vocabulary; of fewer than 16
    experts, which are no eight groups to choose from, 4 work on a token."""
    few = experts < 2 * GROUPS
    changes = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "q_lora_rank": QUERY,
        "kv_lora_rank": LATENT,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
        "moe_intermediate_size": WIDTH,
        "n_routed_experts": experts,
        "num_experts_per_tok": 4 if few else 8,
        "n_group": GROUPS // 2 if few else GROUPS,
        "topk_group": GROUPS // 4 if few else GROUPS // 2,
        "intermediate_size": DENSE_WIDTH,
        "first_k_dense_replace": dense,
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": 0,
    }
    return {**json.loads((TINY_R1 / "config.json").read_text()), **changes}


def linears(layer: int, experts: int, dense: bool) -> dict[str, tuple[int, int]]:
    """FP8 linears of a layer."""
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    shapes = {
        f"{attention}.q_a_proj": (QUERY, HIDDEN),
        f"{attention}.q_b_proj": (HEADS * (NOPE + ROPE), QUERY),
        f"{attention}.kv_a_proj_with_mqa": (LATENT + ROPE, HIDDEN),
        f"{attention}.kv_b_proj": (HEADS * (NOPE + VALUE), LATENT),
        f"{attention}.o_proj": (HIDDEN, HEADS * VALUE),
    }
    if dense:
        shapes |= {f"{mlp}.{part}_proj": (DENSE_WIDTH, HIDDEN) for part in ("gate", "up")}
        return shapes | {f"{mlp}.down_proj": (HIDDEN, DENSE_WIDTH)}
    for name in (f"{mlp}.shared_experts", *(f"{mlp}.experts.{expert}" for expert in range(experts))):
        shapes |= {f"{name}.gate_proj": (WIDTH, HIDDEN), f"{name}.up_proj": (WIDTH, HIDDEN)}
        shapes[f"{name}.down_proj"] = (HIDDEN, WIDTH)
    return shapes


def make_checkpoint(folder: Path, experts: int, layers: int = 1, dense: int = 0, device: str = "cpu") -> None:
    """Writes the layers, 8 experts to a shard; the numbers come from a GPU where one is named."""
    folder.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(0)
    vocabulary = config(experts, layers, dense)["vocab_size"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    plain = {
        "model.embed_tokens.weight": normal(vocabulary, HIDDEN),
        "lm_head.weight": normal(vocabulary, HIDDEN) / HIDDEN**0.5,
        "model.norm.weight": torch.ones(HIDDEN),
    }
    norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    norms |= {"self_attn.q_a_layernorm": QUERY, "self_attn.kv_a_layernorm": LATENT}
    biases = {}
    for layer in range(layers):
        plain |= {f"model.layers.{layer}.{norm}.weight": torch.ones(size) for norm, size in norms.items()}
        if layer >= dense:
            plain[f"model.layers.{layer}.mlp.gate.weight"] = normal(experts, HIDDEN) / HIDDEN**0.5
            biases[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = torch.zeros(experts)
    weight_map: dict[str, str] = {}
    pending = {name: tensor.to(torch.bfloat16).cpu() for name, tensor in plain.items()} | biases
    shapes = {name: shape for layer in range(layers) for name, shape in linears(layer, experts, layer < dense).items()}
    for number, (name, shape) in enumerate(shapes.items(), start=1):
        pending[f"{name}.weight"] = (normal(*shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn).cpu()
        blocks = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
        pending[f"{name}.weight_scale_inv"] = torch.full(blocks, 0.01 / shape[1] ** 0.5)
        if number % 24 == 0 or number == len(shapes):
            file_name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(pending, folder / file_name)
            weight_map |= dict.fromkeys(pending, file_name)
            pending = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config(experts, layers, dense)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_R1 / name, folder / name)


def main() -> None:
    """Makes the checkpoint where it is not there, runs dsquant, prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--memory-budget", default="6GiB")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--preset", default="compact")
    parser.add_argument("--gguf", metavar="TYPE", help="convert to this GGUF type instead")
    parser.add_argument("--calibration", default="none", help="of a conversion to GGUF: none, or a set of texts")
    parser.add_argument("--dense", type=int, default=0, help="dense layers before the mixture")
    parser.add_argument("--device", default="cpu", help="cuda: the numbers are made there, too")
    options = parser.parse_args()
    model = options.folder / "model"
    if not model.exists():  # in a process of its own: Linux counts a parent's memory into the peak of its children
        with ProcessPoolExecutor(1, get_context("spawn")) as maker:
            maker.submit(
                make_checkpoint, model, options.experts, 1 + options.dense, options.dense, options.device
            ).result()
    started = time.monotonic()
    command = [sys.executable, "-c", "from dsquant.cli import main; main()", *arguments(options, model)]
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    if status != 0:
        raise SystemExit(f"dsquant ended with {os.waitstatus_to_exitcode(status)}")
    elapsed = time.monotonic() - started
    peak = usage.ru_maxrss / 2**20
    what = f"gguf {options.gguf}" if options.gguf else f"awq {options.preset}"
    if not options.gguf or options.calibration != "none":
        what += f", {options.samples} x {options.seq_len} tokens"
    print(f"experts {options.experts}, {what}:")
    print(f"peak resident memory {peak:.2f} GiB of a budget of {options.memory_budget}, {elapsed:.0f} s")


def arguments(options: argparse.Namespace, model: Path) -> list[str]:
    """dsquant's arguments.

    Args:
        options: of this script.
        model: the checkpoint.

    Returns:
        The arguments.
    """
    common = [str(model), "--output", str(options.folder / "out"), "--restart", "--no-evaluate", "--json"]
    common += ["--memory-budget", options.memory_budget, "--device", options.device]
    texts = ["--samples", str(options.samples), "--seq-len", str(options.seq_len), "--calibration"]
    if options.gguf:
        calibration = ["--calibration", "none"] if options.calibration == "none" else [*texts, options.calibration]
        return ["gguf", *common, "--type", options.gguf, *calibration]
    return ["awq", *common, "--to", "compressed-tensors", "--preset", options.preset, *texts, "code"]


if __name__ == "__main__":
    main()
