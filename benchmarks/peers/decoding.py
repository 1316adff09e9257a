"""Quantized checkpoints back to float32 weights, sharing no code with dsquant.

Formats go through their own packages where these decode on a CPU. Scales are widened to float32 first, so a weight is
exactly code times scale and no engine's rounding enters.
"""

import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.to_bf16 import read_config


def decode_awq(stored: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """The weights of an AWQ GEMM checkpoint in float32, through autoawq.

    Args:
        stored: tensors as stored.
        config: the checkpoint's quantization_config.

    Returns:
        Name -> float32, quantized linears as `*.weight` [O, I].
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autoawq announces its end on import
        from awq.utils.packing_utils import dequantize_gemm

    weights = {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            scales_GO = stored[f"{module}.scales"].float()
            weight_IO = dequantize_gemm(
                tensor, stored[f"{module}.qzeros"], scales_GO, config["bits"], config["group_size"]
            )
            weights[f"{module}.weight"] = weight_IO.t().contiguous()
        elif kind not in ("qzeros", "scales"):
            weights[name] = tensor.float()
    return weights


def decode_compressed_tensors(stored: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint of packed integers and FP8 blocks in float32, through compressed-tensors.

    Args:
        stored: tensors as stored.
        config: the checkpoint's quantization_config.

    Returns:
        Name -> float32, quantized linears as `*.weight` [O, I].
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match, match_targets

    parsed = QuantizationConfig.model_validate(config)
    linear = torch.nn.Linear(1, 1)
    schemes = {target: group for group in parsed.config_groups.values() for target in group.targets}
    parts = (
        "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale",
        "input_global_scale",
    )  # fmt: skip
    weights = {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed" and tensor.dtype == torch.uint8:
            divisor = stored[f"{module}.weight_global_scale"]
            weights[f"{module}.weight"] = float4_weight(tensor, stored[f"{module}.weight_scale"].float() / divisor)
        elif kind in parts and f"{module}.weight_global_scale" in stored:
            continue
        elif kind == "weight_packed" or tensor.dtype == torch.float8_e4m3fn:
            matched = match_targets(module, linear, schemes)
            if not matched or is_match(module, linear, parsed.ignore):
                raise ValueError(f"{module}: quantized, but no config_group matches it, or it is to be ignored")
            state = {part: stored[f"{module}.{part}"] for part in (kind, *parts) if f"{module}.{part}" in stored}
            state["weight_scale"] = state["weight_scale"].float()
            scheme = schemes[matched[0]]
            decoded = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)
            weights[f"{module}.weight"] = decoded["weight"].float()
        elif kind not in parts:
            weights[name] = tensor.float()
    return weights


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def float4_weight(bytes_OI: torch.Tensor, scales_OB: torch.Tensor) -> torch.Tensor:
    """NVFP4's weight, float32: two codes in a byte, the even column in the low bits, and each block's scale."""
    codes_OI = torch.stack([bytes_OI % 16, bytes_OI // 16], 2).flatten(1).long()
    values_OI = E2M1[codes_OI % 8] * torch.where(codes_OI < 8, 1.0, -1.0)
    return (values_OI.unflatten(1, (scales_OB.shape[1], -1)) * scales_OB.unsqueeze(2)).flatten(1)


def decode_modelopt(stored: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """The weights of ModelOpt's NVFP4 in float32.

    Args:
        stored: tensors as stored.
        config: the checkpoint's quantization_config.

    Returns:
        Name -> float32, quantized linears as `*.weight` [O, I].

    Raises:
        ValueError: not NVFP4.
    """
    if "NVFP4" not in config["quant_algo"]:
        raise ValueError(f"ModelOpt's {config['quant_algo']}, expected NVFP4")
    weights = {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and tensor.dtype == torch.uint8:
            scales_OB = stored[f"{module}.weight_scale"].float() * stored[f"{module}.weight_scale_2"]
            weights[name] = float4_weight(tensor, scales_OB)
        elif kind not in ("weight_scale", "weight_scale_2", "input_scale"):
            weights[name] = tensor.float()
    return weights


def decode_gptq(stored: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """The weights of a GPTQ checkpoint in float32: GPTQModel's and AutoRound's.

    `qweight` int32 [I * bits / 32, O] holds the rows' codes one behind the other, the first in the lowest bits of the
    first number; `qzeros` int32 [G, O * bits / 32] the zero points less one, likewise along the columns; `g_idx` [I]
    each input's group.

    Args:
        stored: tensors as stored.
        config: the checkpoint's quantization_config.

    Returns:
        Name -> float32, quantized linears as `*.weight` [O, I].

    Raises:
        ValueError: the later layout, whose zero points are stored as they are.
    """
    bits = config["bits"]
    if config.get("checkpoint_format", "gptq") != "gptq":
        raise ValueError(f"GPTQ stored as {config['checkpoint_format']}, expected gptq")
    weights = {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            codes_IO = unpacked_codes(tensor.t(), bits).t()
            zeros_GO = (unpacked_codes(stored[f"{module}.qzeros"], bits) + 1) & (2**bits - 1)
            group_I = stored[f"{module}.g_idx"].long()
            scales_GO = stored[f"{module}.scales"].float()
            weight_IO = (codes_IO - zeros_GO[group_I]) * scales_GO[group_I]
            weights[f"{module}.weight"] = weight_IO.t().contiguous()
        elif kind not in ("qzeros", "scales", "g_idx"):
            weights[name] = tensor.float()
    return weights


def unpacked_codes(numbers_RN: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes in rows of int32, one behind the other from the lowest bits: int64 [R, N * 32 / bits]."""
    bits_RB = (numbers_RN.unsqueeze(2) >> torch.arange(32) & 1).flatten(1)
    return (bits_RB.unflatten(1, (-1, bits)).long() << torch.arange(bits)).sum(2)


GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}


def decode_gguf(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of llama.cpp's `deepseek2` and `llama` files in float32 under the releases' names, through gguf-py.

    llama.cpp keeps R1's `kv_b_proj` in two parts: `attn_k_b` [heads, kv_lora, nope], transposed, and `attn_v_b` [heads,
    v, kv_lora]. Llama's queries and keys have their rotary pairs next to each other there, half a head apart here.

    Args:
        folder: holds *.gguf and config.json.

    Returns:
        Name -> float32 [O, I].

    Raises:
        ValueError: a tensor that no name is known for.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        for path in sorted(folder.glob("*.gguf"))
        for tensor in GGUFReader(path).tensors
    }
    weights: dict[str, torch.Tensor] = {}
    config = read_config(folder)
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if not match:
            raise ValueError(f"{folder}: a tensor {name}, for which no name is known")
        layer, part, _ = match.groups()
        prefix = f"model.layers.{layer}." if layer else ""
        if part == "exp_probs_b":
            weights[f"{prefix}mlp.gate.e_score_correction_bias"] = tensor
        elif part == "attn_k_b":
            value = tensors[f"blk.{layer}.attn_v_b.weight"]
            merged = torch.cat([tensor.transpose(1, 2), value], dim=1)
            weights[f"{prefix}self_attn.kv_b_proj.weight"] = merged.flatten(0, 1).contiguous()
        elif part in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            projection = f"{part.split('_')[1]}_proj"
            for expert, weight in enumerate(tensor):
                weights[f"{prefix}mlp.experts.{expert}.{projection}.weight"] = weight.contiguous()
        elif part in GGUF_NAMES:
            llama = config["model_type"] == "llama"
            weights[f"{prefix}{GGUF_NAMES[part]}.weight"] = rotary_halves(tensor, part, config) if llama else tensor
        elif part not in ("attn_v_b", "rope_freqs"):
            raise ValueError(f"{folder}: a tensor {name}, for which no name is known")
    return weights


def rotary_halves(weight_OI: torch.Tensor, part: str, config: dict) -> torch.Tensor:
    """A weight of a Llama with the rotary pairs of its queries or keys half a head apart, as releases have them."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    if part not in heads:
        return weight_OI
    return weight_OI.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def gguf_bits(folder: Path) -> float:
    """Stored bits for each weight of the layers' matrices in a folder's *.gguf, the routers left out."""
    from gguf import GGUFReader

    matrices = [
        tensor
        for path in sorted(folder.glob("*.gguf"))
        for tensor in GGUFReader(path).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name
    ]
    return float(8 * sum(int(one.n_bytes) for one in matrices) / sum(int(one.n_elements) for one in matrices))


def stored_bits(folder: Path) -> float:
    """Stored bits for each weight of a checkpoint's quantized linears; a scale counts 16 bits.

    Where linears have several widths, those of the decoder that are not quantized count too.

    Raises:
        ValueError: nothing in the folder is quantized.
    """
    config = read_config(folder)
    if config["quantization_config"]["quant_method"] == "gguf":
        return gguf_bits(folder)
    from safetensors import safe_open

    code_bits = config["quantization_config"].get("bits", 4)
    groups = config["quantization_config"].get("config_groups", {})
    mixed = any("Linear" not in group["targets"] for group in groups.values())
    layers = tuple(f"model.layers.{number}." for number in range(config["num_hidden_layers"])) if mixed else ()
    bits, weights = 0, 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                more_bits, more_weights = _bits_and_weights(opened, name, layers, code_bits)
                bits, weights = bits + more_bits, weights + more_weights
    if not weights:
        raise ValueError(f"{folder}: no quantized weights")
    return bits / weights


def _bits_and_weights(opened: Any, name: str, unquantized: tuple[str, ...], code_bits: int) -> tuple[int, int]:
    """What a tensor adds to the stored bits and to the weights that they are for.

    Args:
        opened: a safetensors file.
        name: the tensor.
        unquantized: the layers whose unquantized linears count.
        code_bits: bits of a code in a `qweight`.
    """
    kind, found = name.rpartition(".")[2], opened.get_slice(name)
    shape = found.get_shape()
    size = math.prod(shape)
    if found.get_dtype() == "U8" and kind in ("weight", "weight_packed"):
        return 8 * size, 2 * size
    if found.get_dtype() in ("U8", "F8_E4M3") and kind == "weight_scale":
        return 8 * size, 0
    if kind == "qweight":
        return 32 * size, 32 * size // code_bits
    if kind == "weight_packed":
        return 32 * size, math.prod(opened.get_tensor(name.replace(kind, "weight_shape")).tolist())
    if kind == "weight" and len(shape) == 2 and name.startswith(unquantized) and not name.endswith(".mlp.gate.weight"):
        return 16 * size, size
    return {"qzeros": 32, "weight_zero_point": 32, "scales": 16, "weight_scale": 16}.get(kind, 0) * size, 0


DECODERS = {
    "awq": decode_awq,
    "compressed-tensors": decode_compressed_tensors,
    "gptq": decode_gptq,
    "modelopt": decode_modelopt,
}
