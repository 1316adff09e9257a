"""A GGUF file's keys: the network's numbers and the tokenizer, as llama.cpp reads them.

Reference: the loaders of llama.cpp's src/models, and src/llama-vocab.cpp.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dsquant.errors import InputError
from dsquant.files.foreign import LARGEST_MODEL_TEXT_BYTES, find_file
from dsquant.files.strict_json import read_json_object
from dsquant.formats.gguf.rope import scaling_keys
from dsquant.model.families.family import GgufFacts
from dsquant.model.rotary import Rotary

# Part of a pre-tokenizer's regular expressions -> llama.cpp's name for it; the first that is found counts.
PRE_TOKENIZERS = (
    (r"[一-龥\u3040-ゟ゠-ヿ]+", "deepseek-v3"),
    (r"[\p{Han}]+", "kimi-k2"),
    (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|", "llama-bpe"),
    (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|", "qwen2"),
)
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused\d+>|<(pad|mask|s|unk)>|</s>|\[@BOS@\]")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5


def add_model_keys(
    writer: Any, facts: GgufFacts, config: Mapping[str, Any], rotary: Rotary, num_mtp_layers: int
) -> None:
    """Adds the network's numbers, `model_keys`, to a `gguf.GGUFWriter`."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add |= {list: writer.add_array}
    for key, value in model_keys(facts, config, rotary, num_mtp_layers).items():
        add[type(value)](f"{facts.architecture}.{key}", value)


def model_keys(facts: GgufFacts, config: Mapping[str, Any], rotary: Rotary, num_mtp_layers: int = 0) -> dict[str, Any]:
    """Returns the network's numbers in the order of the file: key without the architecture's name -> value.

    `config` has transformers' defaults filled in; the file holds `num_mtp_layers` multi-token-prediction layers.
    """
    keys = {
        "block_count": config["num_hidden_layers"] + num_mtp_layers,
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "vocab_size": config["vocab_size"],
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
    }
    mtp = {"nextn_predict_layers": num_mtp_layers} if num_mtp_layers else {}
    scaling = scaling_keys(config["rope_parameters"], facts.split is not None, rotary.magnitude)
    return keys | facts.keys(config) | mtp | scaling


def add_tokenizer_keys(
    writer: Any, folder: Path, vocab_size: int, names: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """Adds tokens, merges, special tokens and the chat template of a checkpoint folder to a `gguf.GGUFWriter`.

    Ids below `vocab_size`, the rows of the embedding, that the tokenizer does not have become unused tokens; `names`
    are the architecture's own names of pre-tokenizers. Returns the added tokens that are left out for want of a row:
    llama.cpp wants one for every token. Raises InputError where llama.cpp has no name for the tokenizer, or texts begin
    or end with a token that the embedding has no row for.
    """
    from gguf import SpecialVocab

    path = find_file(folder, "tokenizer.json")
    if path is None:
        raise InputError(
            f"{folder / 'tokenizer.json'} is missing; GGUF files hold the tokenizer, so it has to be in the checkpoint"
        )
    tokenizer = read_json_object(path, most_bytes=LARGEST_MODEL_TEXT_BYTES)
    if tokenizer.get("model", {}).get("type") != "BPE":
        raise InputError(
            f"{path}: only byte-level BPE tokenizers are supported, found {tokenizer.get('model', {}).get('type')!r}"
        )
    _check_normalizer(path, tokenizer)
    tokens, types, left_out = _tokens(path, tokenizer, vocab_size)
    writer.add_tokenizer_model("gpt2")
    cutting = pre_tokenizer_name(path, tokenizer)
    writer.add_tokenizer_pre(names.get(cutting, cutting))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    for kind, number in SpecialVocab(folder).special_token_ids.items():
        if kind in ("bos", "eos") and number >= vocab_size:
            raise InputError(
                f"{path}: {kind}_token is the token {number}, and the embedding has {vocab_size} rows: llama.cpp would "
                "have no such token; take tokenizer and weights of one release"
            )
    SpecialVocab(folder, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)
    return left_out


def _tokens(path: Path, tokenizer: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int], list[str]]:
    """Returns tokens and their types by id, and the added tokens without a row of the embedding."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    vocabulary, added_tokens = tokenizer["model"].get("vocab", {}), tokenizer.get("added_tokens", [])
    _check_ids(path, [*vocabulary.items(), *((added["content"], added["id"]) for added in added_tokens)])
    for token, number in vocabulary.items():
        if number >= vocab_size:
            raise InputError(
                f"{path}: token {token!r} has the id {number}, the embedding has {vocab_size} rows; tokenizer and "
                "weights are of different models"
            )
        tokens[number], types[number] = token, NORMAL
    for added in added_tokens:
        if added["id"] < vocab_size:
            special = added.get("special") or _LOOKS_SPECIAL.fullmatch(added["content"])
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if special else USER_DEFINED
    return tokens, types, [added["content"] for added in added_tokens if added["id"] >= vocab_size]


def _check_normalizer(path: Path, tokenizer: Mapping[str, Any]) -> None:
    """Refuses normalizers but NFC, which changes no usual text: llama.cpp cuts texts as they stand."""
    normalizer = tokenizer.get("normalizer")
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else [normalizer]
    other = next((step for step in steps if step is not None and step != {"type": "NFC"}), None)
    if other is not None:
        raise InputError(
            f"{path}: its normalizer {other!r:.100} changes texts before they are cut, which llama.cpp would not do; "
            "not for GGUF"
        )


def _check_ids(path: Path, tokens: list[tuple[Any, Any]]) -> None:
    names: dict[int, str] = {}
    for token, number in tokens:
        if not isinstance(token, str) or not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise InputError(f"{path}: token {token!r:.80} has the id {number!r:.80}, expected a number from 0 on")
        if names.setdefault(number, token) != token:
            raise InputError(f"{path}: {names[number]!r:.80} and {token!r:.80} are both the token {number}")


def _built_in(pre_tokenizer: Mapping[str, Any]) -> str | None:
    """Returns the name of a pre-tokenizer that has the expression of byte-level ones, alone or behind one that cuts
    digits apart."""
    parts = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    kinds = [part.get("type") for part in parts]
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    return "gpt-2" if kinds == ["ByteLevel"] else None


def pre_tokenizer_name(path: Path, tokenizer: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name for the pre-tokenizer of a tokenizer.json's content, found from its regular expressions;
    raises InputError where it has none."""
    found = json.dumps(tokenizer.get("pre_tokenizer"), ensure_ascii=False)
    patterns = re.findall(r'"Regex": ("(?:[^"\\]|\\.)*")', found)
    expressions = [str(json.loads(pattern)) for pattern in patterns]
    if not expressions and (name := _built_in(tokenizer.get("pre_tokenizer") or {})):
        return name
    for part, name in PRE_TOKENIZERS:
        wanted = part.replace("\\u3040", "\u3040")
        if any(wanted in expression for expression in expressions):
            return name
    raise InputError(
        f"{path}: this pre-tokenizer is none of {', '.join(name for _, name in PRE_TOKENIZERS)}; llama.cpp would cut "
        f"text into other tokens than the model was trained on (its regular expressions: {expressions})"
    )
