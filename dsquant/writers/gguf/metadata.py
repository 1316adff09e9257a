"""A GGUF file's keys: the network's numbers and the tokenizer, as llama.cpp reads them.

Reference: the loaders of `deepseek2`, `llama`, `qwen2` and `qwen3` in llama.cpp's src/models, and src/llama-vocab.cpp.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dsquant.errors import InputError
from dsquant.strict_json import LONGEST_MODEL_JSON_BYTES, read_json_object

# DeepSeek's converter wrote this factor into the YaRN key once, and the loader has divided by it ever since.
YARN_LOG_FACTOR = 0.1
# Part of a pre-tokenizer's regular expressions -> llama.cpp's name for it; the first that is found counts.
PRE_TOKENIZERS = (
    (r"[一-龥\u3040-ゟ゠-ヿ]+", "deepseek-v3"),
    (r"[\p{Han}]+", "kimi-k2"),
    (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|", "llama-bpe"),
    (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|", "qwen2"),
)
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused\d+>|<(pad|mask|s|unk)>|</s>|\[@BOS@\]")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5


def add_model_keys(writer: Any, config: Mapping[str, Any], name: str, num_mtp_layers: int) -> None:
    """Adds the network's numbers.

    Args:
        writer: a `gguf.GGUFWriter`.
        config: config.json's content.
        name: the model's name, for people.
        num_mtp_layers: multi-token-prediction layers that the file holds.
    """
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"] + num_mtp_layers)
    writer.add_context_length(int(config.get("max_position_embeddings") or 4096))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(config["vocab_size"])
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if "kv_lora_rank" in config:
        _add_deepseek_keys(writer, config, num_mtp_layers)
    else:
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
    if rope.get("rope_type") == "yarn":
        _add_yarn_keys(writer, rope)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's numbers in one place: transformers 5 has `rope_parameters`, older configs two fields."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    if config.get("rope_theta") is not None:
        rope.setdefault("rope_theta", config["rope_theta"])
    return rope


def _add_deepseek_keys(writer: Any, config: Mapping[str, Any], num_mtp_layers: int) -> None:
    from gguf import ExpertGatingFuncType

    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)  # all heads share the latent
    if config.get("q_lora_rank") is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(float(config.get("routed_scaling_factor", 1.0)))
    writer.add_expert_weights_norm(bool(config.get("norm_topk_prob", False)))
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    if config.get("n_group", 1) > 1:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    if num_mtp_layers:
        writer.add_nextn_predict_layers(num_mtp_layers)


def _add_yarn_keys(writer: Any, rope: Mapping[str, Any]) -> None:
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast", 32)))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow", 1)))
    if rope.get("mscale_all_dim") is not None:
        writer.add_rope_scaling_yarn_log_mul(YARN_LOG_FACTOR * float(rope["mscale_all_dim"]))


def rope_factors(config: Mapping[str, Any]) -> torch.Tensor | None:
    """Llama 3's frequency factors, which GGUF stores as the tensor `rope_freqs.weight`.

    Reference: transformers' `_compute_llama3_parameters`; ggml divides each frequency by its factor.

    Args:
        config: config.json's content.

    Returns:
        float32 [head_dim / 2]; None where the model does not scale its frequencies so.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def add_tokenizer_keys(writer: Any, folder: Path, vocab_size: int) -> None:
    """Adds tokens, merges, special tokens and the chat template.

    Args:
        writer: a `gguf.GGUFWriter`.
        folder: the checkpoint, with tokenizer.json.
        vocab_size: rows of the embedding; ids that the tokenizer does not have become unused tokens.

    Raises:
        InputError: where the tokenizer is not one that llama.cpp has under a name.
    """
    from gguf import SpecialVocab

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} is missing; GGUF files hold the tokenizer, so it has to be in the checkpoint")
    tokenizer = read_json_object(path, most_bytes=LONGEST_MODEL_JSON_BYTES)
    if tokenizer.get("model", {}).get("type") != "BPE":
        raise InputError(
            f"{path}: only byte-level BPE tokenizers are supported, found {tokenizer.get('model', {}).get('type')!r}"
        )
    tokens, types = _tokens(tokenizer, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(path, tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    SpecialVocab(folder, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for added in tokenizer.get("added_tokens", []):
        special = added.get("special") or _LOOKS_SPECIAL.fullmatch(added["content"])
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if special else USER_DEFINED
    return tokens, types


def pre_tokenizer_name(path: Path, tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for a tokenizer's way to cut text into words, found from its regular expressions.

    Args:
        path: of tokenizer.json, for the message.
        tokenizer: its content.

    Returns:
        deepseek-v3, kimi-k2, llama-bpe, qwen2 or gpt-2.

    Raises:
        InputError: where it is none of these.
    """
    found = json.dumps(tokenizer.get("pre_tokenizer"), ensure_ascii=False)
    patterns = re.findall(r'"Regex": ("(?:[^"\\]|\\.)*")', found)
    expressions = [str(json.loads(pattern)) for pattern in patterns]
    if not expressions and (tokenizer.get("pre_tokenizer") or {}).get("type") == "ByteLevel":
        return "gpt-2"  # the expression that byte-level pre-tokenizers have built in
    for part, name in PRE_TOKENIZERS:
        wanted = part.replace("\\u3040", "\u3040")
        if any(wanted in expression for expression in expressions):
            return name
    raise InputError(
        f"{path}: this pre-tokenizer is none of {', '.join(name for _, name in PRE_TOKENIZERS)}; llama.cpp would cut "
        f"text into other tokens than the model was trained on (its regular expressions: {expressions})"
    )
