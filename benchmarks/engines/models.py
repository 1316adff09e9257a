"""The engine bench's models, one of each family that engines run, their outputs, and who is said to run these."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines.padded import padded, padded_config
from benchmarks.peers.to_bf16 import read_tensors
from dsquant.calibration.texts import held_out_tokens, load_tokenizer
from dsquant.formats.checkpoints import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "support"))  # whose modules name one another

from architectures import ARCHITECTURES  # noqa: E402
from checkpoints import LLAMA, QWEN2, QWEN3, add_tokenizer, make_dense, save_checkpoint, stored  # noqa: E402
from glm_checkpoint import make_glm  # noqa: E402
from random_models import make_random  # noqa: E402
from released_int4 import make as make_released_int4  # noqa: E402

TINY_R1 = ROOT / "dsquant" / "assets" / "tiny-r1"
SAMPLES, SEQ_LEN = 4, 256
# One of each kind of block; of IQ1, IQ2 and IQ3, whose search takes minutes here, tests/formats/test_gguf_llama_cpp.py.
TYPES = (
    "Q8_0", "F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q4_K_M+", "Q5_K_M", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4_MOE", "NVFP4",
)  # fmt: skip
VLLM, VLLM_GPU, TRANSFORMERS = "vLLM", "vLLM on an H200", "transformers"
MLX, LLAMA_CPP, IK = "mlx-lm", "llama.cpp", "ik_llama.cpp"
BASELINE = "BF16"


@dataclass(frozen=True)
class Output:
    """What one format makes of a model."""

    to: str
    options: dict[str, Any] = field(default_factory=dict)
    engines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A small model of one architecture."""

    make: Callable[[Path], Path]
    mixture: bool = True
    gguf_types: tuple[str, ...] = ("Q8_0", "Q4_K_M")
    latent: bool = False
    """Whether it has R1's own sizes of heads."""
    every_width: bool = False
    """Whether it becomes every width of integers and every kind of float; others become the usual ones."""
    baseline: str = BASELINE
    """What the model itself is called in the tables."""
    only: dict[str, Output] = field(default_factory=dict)
    """Its outputs, where not all formats are made of it."""
    loaded_as: str = ""
    """The `model_type` that engines are told, where the release's is code in the checkpoint."""


def make_padded(folder: Path, fp8: bool = False) -> Path:
    """tiny-r1 with R1's head sizes, in BF16 or in FP8 blocks; the FP8 scales are made anew."""
    small = open_checkpoint(TINY_R1)
    config = padded_config(small.config)
    if fp8:
        config["quantization_config"] = json.loads((TINY_R1 / "config.json").read_text())["quantization_config"]
    save_checkpoint(folder, config, stored(padded(small.config, small.weights), fp8=fp8))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (TINY_R1 / name).exists():
            (folder / name).write_bytes((TINY_R1 / name).read_bytes())
    return folder


def _dense(config: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda folder: add_tokenizer(make_dense(folder, config), 280)


def _qwen3_moe(folder: Path) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 256}
    return add_tokenizer(make_random(folder, ARCHITECTURES["Qwen3 MoE"].config | sizes), 280)


# R1's heads, and widths that experts' kernels take.
LATENT_SIZES = {
    "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip


def _latent(name: str, **sizes: int) -> Callable[[Path], Path]:
    """Makes a model of random weights."""
    return lambda folder: add_tokenizer(make_random(folder, ARCHITECTURES[name].config | LATENT_SIZES | sizes), 280)


CT = "compressed-tensors"
IN_4_BITS = {f"{CT} 4 bits": Output(CT, {}, (VLLM, VLLM_GPU))}
FAMILIES = {
    "DeepSeek-V3 (tiny-r1, R1's heads)": Family(make_padded, gguf_types=TYPES, latent=True, every_width=True),
    "DeepSeek-V3 in FP8": Family(
        lambda folder: make_padded(folder, fp8=True),
        gguf_types=(),
        baseline="FP8",
        only={
            f"{CT} 4 bits, rest FP8": Output(CT, {}, (VLLM_GPU, TRANSFORMERS)),
            f"{CT} 4 bits, rest FP8, quality": Output(CT, {"preset": "quality"}, (VLLM_GPU,)),
            f"{CT} 4 bits, rest FP8, FP8 activations": Output(CT, {"activations": "fp8"}, (VLLM_GPU,)),
            "nvfp4, rest FP8": Output("nvfp4", {}, (VLLM_GPU,)),
            "mxfp4, rest FP8": Output("mxfp4", {}, (VLLM_GPU,)),
        },
    ),
    "GLM-4.5": Family(lambda folder: add_tokenizer(make_glm(folder, moe_intermediate_size=256), 280)),
    "GLM-4.7-Flash": Family(_latent("GLM-4.7-Flash"), only=IN_4_BITS),
    "GLM-5": Family(_latent("GLM-5", index_n_heads=32), only=IN_4_BITS),
    "DeepSeek-V3.2": Family(_latent("DeepSeek-V3.2", index_n_heads=64), only=IN_4_BITS),
    "DeepSeek-V2": Family(_latent("DeepSeek-V2"), only=IN_4_BITS),
    "Kimi-K2-Thinking": Family(
        lambda folder: make_released_int4(folder, **LATENT_SIZES)[0],
        gguf_types=(),
        only={f"{CT} 4 bits, experts as released": Output(CT, {}, (VLLM, VLLM_GPU, TRANSFORMERS))},
        loaded_as="deepseek_v3",
    ),
    "Qwen3 MoE": Family(_qwen3_moe),
    "Llama": Family(_dense(LLAMA), mixture=False, every_width=True),
    "Qwen2": Family(_dense(QWEN2), mixture=False),
    "Qwen3": Family(_dense(QWEN3), mixture=False),
}


def _w4a8(kind: str) -> Output:
    # vLLM 0.22 takes INT8 for FP8 on a GPU.
    return Output(CT, {"activations": kind.lower()}, (VLLM, VLLM_GPU) if kind == "FP8" else (VLLM,))


def outputs(family: Family) -> dict[str, Output]:
    """Name -> every output that README's table of formats claims some engine runs, for one family."""
    if family.only:
        return family.only
    of_vllm = (VLLM, VLLM_GPU)
    all_three = (*of_vllm, TRANSFORMERS)
    of_awq = of_vllm if family.mixture else all_three
    found = {
        "awq": Output("awq", {"symmetric": False}, of_awq),
        "awq, symmetric": Output("awq", {"symmetric": True}, of_awq),
        f"{CT} 4 bits": Output(CT, {}, all_three),
        f"{CT} 4 bits, asymmetric": Output(CT, {"symmetric": False}, of_vllm),
        **{f"{CT} {bits} bits": Output(CT, {"bits": bits}, all_three) for bits in (8, 3)},
        **{f"mlx {bits} bits": Output("mlx", {"bits": bits, "mtp": "drop"}, (MLX,)) for bits in (4, 8, 3)},
    }
    if family.mixture:
        found[f"{CT} 4 bits, quality"] = Output(CT, {"preset": "quality"}, all_three)
    if family.every_width:
        found |= {f"{CT} {bits} bits": Output(CT, {"bits": bits}, all_three) for bits in (2, 5, 6, 7)}
        found |= {f"mlx {bits} bits": Output("mlx", {"bits": bits, "mtp": "drop"}, (MLX,)) for bits in (2, 5, 6)}
        found |= {f"{CT} 4 bits, {kind} activations": _w4a8(kind) for kind in ("FP8", "int8")}
        found |= {
            "nvfp4": Output("nvfp4", {}, of_awq),  # transformers forgets the tensor's scale in experts (decision 41)
            "mxfp4": Output("mxfp4", {}, all_three),
            "nvfp4-modelopt": Output("nvfp4-modelopt", {}, of_vllm),
        }
    llama = (LLAMA_CPP, IK) if family.latent or not family.mixture else (LLAMA_CPP,)
    for name in (*family.gguf_types, "BF16"):
        engines = (LLAMA_CPP,) if name == "NVFP4" else llama  # a type that ik_llama.cpp has not
        found[f"gguf:{name}"] = Output(f"gguf:{name}", {"mtp": "drop"}, engines)
    return found


def without_mtp(model: Path, folder: Path) -> Path:
    """A copy without multi-token-prediction layers, which mlx-lm knows only as R1's layer 61; the model if it has none.

    What they predict counts nowhere here. The key rope_scaling stands in the config, which mlx-lm demands of GLM-4.5.
    """
    config = json.loads((model / "config.json").read_text())
    if not config.get("num_nextn_predict_layers"):
        return model
    last = f"model.layers.{config['num_hidden_layers']}."
    tensors = {name: one for name, one in read_tensors(model).items() if not name.startswith(last)}
    save_checkpoint(folder, {"rope_scaling": None} | config | {"num_nextn_predict_layers": 0}, tensors)
    return folder


def tokens(model: Path) -> torch.Tensor:
    """int64 [N, T]: held-out code for a trained model, random tokens for a random one."""
    if model.parent.name.startswith("DeepSeek"):
        return held_out_tokens("code", load_tokenizer(model), SEQ_LEN, SAMPLES)
    return torch.randint(6, 280, (SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(0))
