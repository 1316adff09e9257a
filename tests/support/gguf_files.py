"""What the tests of GGUF share: options, errors of types, tensors as gguf-py reads them."""

import json
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import torch
from gguf.quants import dequantize

from dsquant.formats.checkpoints import open_checkpoint

PLAIN: dict[str, Any] = {"calibration": "none", "evaluate": False, "progress": False}


CALIBRATED: dict[str, Any] = {"samples": 6, "seq_len": 32, "evaluate": False, "progress": False}


# Relative root mean square error of each type on Gaussian weights is below this.
LARGEST_ERROR = {
    "F32": 0.0, "F16": 5e-4, "BF16": 4e-3, "Q8_0": 0.01, "Q4_0": 0.12, "Q4_1": 0.11, "Q5_0": 0.06, "Q5_1": 0.055,
    "Q2_K": 0.45, "Q3_K": 0.22, "Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.03, "IQ4_NL": 0.1, "IQ4_XS": 0.1,
    "IQ1_S": 0.6, "IQ1_M": 0.55, "IQ2_XXS": 0.45, "IQ2_XS": 0.4, "IQ2_S": 0.32, "IQ3_XXS": 0.24, "IQ3_S": 0.19,
    "MXFP4": 0.14, "NVFP4": 0.12,
}  # fmt: skip


def tensors_of(folder: Path) -> dict[str, Any]:
    """Every tensor of every part, by gguf-py."""
    files = [file for file in sorted(folder.glob("*.gguf")) if not file.name.startswith("imatrix")]
    return {tensor.name: tensor for file in files for tensor in gguf_py.GGUFReader(file).tensors}


def decoded(tensor: Any) -> torch.Tensor:
    """A tensor's values, columns last."""
    values = dequantize(np.ascontiguousarray(tensor.data), tensor.tensor_type)
    return torch.from_numpy(np.array(values, dtype=np.float32)).reshape([int(n) for n in tensor.shape[::-1]])


def expected(folder: Path, num_layers: int) -> dict[str, torch.Tensor]:
    """Name -> values of every tensor that an R1 checkpoint becomes, worked out here and not by dsquant."""
    config, weights = json.loads((folder / "config.json").read_text()), open_checkpoint(folder).weights
    heads, nope, value = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    found = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for layer in range(num_layers):
        source, block = f"model.layers.{layer}", f"blk.{layer}"
        names = {
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q_a": "self_attn.q_a_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            "attn_output": "self_attn.o_proj",
        }  # fmt: skip
        kv_b = weights[f"{source}.self_attn.kv_b_proj.weight"].reshape(heads, nope + value, -1)
        found[f"{block}.attn_k_b.weight"] = torch.stack([kv_b[head, :nope].T for head in range(heads)])
        found[f"{block}.attn_v_b.weight"] = torch.stack([kv_b[head, nope:] for head in range(heads)])
        if layer < config["first_k_dense_replace"]:
            names |= {f"ffn_{kind}": f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}
        else:
            names |= {f"ffn_{kind}_shexp": f"mlp.shared_experts.{kind}_proj" for kind in ("gate", "up", "down")}
            names["ffn_gate_inp"] = "mlp.gate"
            found[f"{block}.exp_probs_b.bias"] = weights[f"{source}.mlp.gate.e_score_correction_bias"]
            for kind in ("gate", "up", "down"):
                experts = range(config["n_routed_experts"])
                parts = [weights[f"{source}.mlp.experts.{number}.{kind}_proj.weight"] for number in experts]
                found[f"{block}.ffn_{kind}_exps.weight"] = torch.stack(parts)
        found |= {f"{block}.{name}.weight": weights[f"{source}.{module}.weight"] for name, module in names.items()}
    return found


def with_keys(path: Path, copy: Path, changes: dict[str, Any], without: tuple[str, ...] = ()) -> Path:
    """Copies a GGUF file with other keys, some left out."""
    reader = gguf_py.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf_py.GGUFWriter(copy, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in (*changes, *without):
            continue
        element = field.types[-1] if field.types[0] == gguf_py.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in changes.items():
        add[type(value)](name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy
