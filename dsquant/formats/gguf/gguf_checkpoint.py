"""A GGUF file as a checkpoint of its own: config, parameter names and tokenizer made from its keys.

The reverse of `metadata` and `layout`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsquant.errors import InputError
from dsquant.files.foreign import blaming
from dsquant.formats.gguf.file import GgufTensor, read_gguf
from dsquant.formats.gguf.gguf_weights import GgufWeights, gguf_parts
from dsquant.formats.gguf.layout import parameters
from dsquant.formats.gguf.metadata import CONTROL, UNUSED, USER_DEFINED
from dsquant.formats.gguf.rope import BOUND_KEYS, BOUNDS, YARN_LOG_FACTOR, rotary_of_keys
from dsquant.formats.gguf.types import MIXTURES, TARGET_KEY, block_of
from dsquant.kernels.values import SUPER_BLOCK
from dsquant.model.families import FAMILIES, GGUF_FAMILIES, architecture_of, gguf_families
from dsquant.model.families.family import Family, GgufFacts
from dsquant.model.overlays import on_device
from dsquant.model.rotary import Rotary, yarn_mscale
from dsquant.model.skeleton import network_rotary
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.locate import ASSETS, EMBEDDED_MODEL
from dsquant.source.shards import ShardIndex
from dsquant.source.weights import CPU

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name of a pre-tokenizer -> the regular expression by which it cuts text (src/llama-vocab.cpp).
EXPRESSIONS = {
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "glm4": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
    "deepseek-r1-qwen": _WORDS + r"\p{N}" + _REST,
}
OR_REFERENCE = "name the checkpoint that it was made from as the reference"
# No count, size or factor of a network is larger.
LARGEST_NUMBER = 2.0**62
# Llama 3.1's and 3.3's scaling of rotary frequencies; GGUF stores only what comes of it.
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@dataclass(frozen=True)
class GgufHeader:
    """The keys of a GGUF file, and its tensors without their data."""

    file: Path
    """The file, or the first of a split one."""
    keys: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    """By name, of all parts."""

    @property
    def architecture(self) -> str:
        """The checkpoint's name of the architecture; llama.cpp's where dsquant does not know it."""
        name = str(self.keys.get("general.architecture"))
        return GGUF_FAMILIES[name].architecture if name in GGUF_FAMILIES else name

    @property
    def numbers(self) -> dict[str, Any]:
        """The network's keys, without the architecture's name; a list of equal numbers is one number."""
        prefix = f"{self.keys.get('general.architecture')}."
        found = {key.removeprefix(prefix): value for key, value in self.keys.items() if key.startswith(prefix)}
        return {key: _one(value) for key, value in found.items()}

    @property
    def rotary(self) -> Rotary:
        """The rotary embedding that llama.cpp computes, started with the file's bounds of yarn; raises InputError where
        a key is missing or the scaling is unknown."""
        return self._rotary(self.numbers)

    @property
    def default_rotary(self) -> Rotary:
        """The one that it computes with its own."""
        own = {BOUND_KEYS + name: value for name, value in BOUNDS.items()}
        return self._rotary(self.numbers | own)

    def _rotary(self, numbers: Mapping[str, Any]) -> Rotary:
        factors = self.tensors.get("rope_freqs.weight")
        factors_F = None if factors is None else torch.from_numpy(factors.data.copy()).float().flatten()
        try:
            with np.errstate(divide="raise", over="raise", invalid="raise"):
                facts = GGUF_FAMILIES[str(self.keys.get("general.architecture"))].gguf
                return rotary_of_keys(facts, numbers, factors_F)
        except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise InputError(f"{self.file}: its keys describe no rotary embedding: {error}") from error

    @property
    def num_tokens(self) -> int:
        """Rows of the embedding; 0 without one."""
        table = self.tensors.get("token_embd.weight")
        return 0 if table is None else int(table.shape[1])

    @property
    def num_bytes(self) -> int:
        return sum(int(tensor.n_bytes) for tensor in self.tensors.values())

    @property
    def format(self) -> str:
        """`GGUF Q4_K_M`, from the file's own type number, or `GGUF 4.5bits` where types were chosen for a target."""
        from gguf import LlamaFileType

        target = str(self.keys.get(TARGET_KEY))
        if re.fullmatch(r"[\d.]{1,9}[A-Za-z]{1,4}", target):
            return f"GGUF {target}"
        try:
            name = LlamaFileType(self.keys.get("general.file_type")).name
        except ValueError:
            return "GGUF"
        return f"GGUF {name.removeprefix('MOSTLY_').removeprefix('ALL_')}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the name of the file's mixture does not show: tensors whose rows its blocks do not fit."""
        matrices = [
            tensor
            for tensor in self.tensors.values()
            if len(tensor.shape) > 1 and tensor.tensor_type.name != "F32"  # such as routers, in every mixture
        ]
        others = [tensor for tensor in matrices if int(tensor.shape[0]) % SUPER_BLOCK]
        base = MIXTURES.get(self.format.removeprefix("GGUF "), "Q4_K")  # types that were chosen begin with that
        if not others or block_of(base)[0] != SUPER_BLOCK:
            return ()
        types = " and ".join(sorted({tensor.tensor_type.name for tensor in others}))
        rows = f"{len(others)} of {len(matrices)} matrices have rows that are no multiple of {SUPER_BLOCK}"
        return (f"{self.file.name}: {rows} and are stored as {types}",)

    @property
    def tokens(self) -> dict[str, int] | None:
        """Token -> id of the vocabulary without unused ids; None where the file holds none. Raises InputError where
        tokens and their types do not match."""
        tokens, types = self.keys.get("tokenizer.ggml.tokens"), self.keys.get("tokenizer.ggml.token_type")
        if tokens is None or types is None:
            return None
        if not isinstance(tokens, list) or not isinstance(types, list) or len(tokens) != len(types):
            raise InputError(f"{self.file}: its tokens and their types are not two lists of one length")
        return {str(token): number for number, token in enumerate(tokens) if types[number] != UNUSED}


def _one(value: Any) -> Any:
    same = isinstance(value, list) and value and isinstance(value[0], int | float) and len(set(value)) == 1
    return value[0] if same else value


def read_header(file: Path) -> GgufHeader:
    """Reads the keys and the directory of tensors of a file, or of a split one from its first part; raises InputError
    where a part is missing or damaged."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError(f"{file}: reading GGUF files needs the package gguf: pip install gguf") from error

    keys: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for part in gguf_parts(file):
        if not part.exists():
            raise InputError(f"{part} is missing; all parts of a split file must lie in one folder")
        reader = read_gguf(part)
        keys = reader.keys | keys
        tensors |= {tensor.name: tensor for tensor in reader.tensors}
    return GgufHeader(file, keys, tensors)


def gguf_checkpoint(header: GgufHeader, device: torch.device = CPU) -> Checkpoint:
    """Makes a checkpoint of a GGUF file alone, without multi-token-prediction layers and with an empty index of shards.

    Raises InputError where the file is damaged, or of an architecture that dsquant does not know.
    """
    config = _config(header)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in header.tensors.items():
        shape = tuple(int(size) for size in reversed(tensor.shape))
        for parameter, found in parameters(name, shape, config):
            parts = parameter.split(".")
            if parts[1] != "layers" or int(parts[2]) < config["num_hidden_layers"]:
                shapes[parameter] = found
    config["tie_word_embeddings"] = "lm_head.weight" not in shapes
    config["vocab_size"] = shapes.get("model.embed_tokens.weight", (0,))[0]
    _check_rotary(header, config)
    weights = on_device(GgufWeights(header.file, shapes, config), device)
    return Checkpoint(header.file, config, ShardIndex(header.file.parent, {}), weights)


def gguf_tokenizer(header: GgufHeader) -> Any:
    """Builds a transformers tokenizer from a file's keys; raises InputError where it holds none, or one of a kind that
    dsquant cannot build."""
    kind = header.keys.get("tokenizer.ggml.model")
    if header.tokens is None or kind != "gpt2" or "tokenizer.ggml.merges" not in header.keys:
        found = f"tokenizer.ggml.model is {kind!r:.80}"
        raise InputError(f"{header.file}: it holds no byte-level BPE tokenizer ({found}); {OR_REFERENCE}")
    with blaming(f"{header.file}: the tokenizer cannot be read", OR_REFERENCE):
        return _byte_level_bpe(header.file, header.keys, header.tokens)


def _byte_level_bpe(file: Path, keys: Mapping[str, Any], vocabulary: dict[str, int]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(file, str(keys.get("tokenizer.ggml.pre")))
    tokenizer.decoder = decoders.ByteLevel()
    types = keys["tokenizer.ggml.token_type"]
    for token, number in vocabulary.items():
        if types[number] in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=types[number] == CONTROL, normalized=False)])
    names = {value: key for key, value in vocabulary.items()}
    special = {
        f"{kind}_token": names[keys[f"tokenizer.ggml.{kind}_token_id"]]
        for kind in ("bos", "eos")
        if keys.get(f"tokenizer.ggml.{kind}_token_id") in names
    }
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path=str(file), **special)
    found.chat_template = keys.get("tokenizer.chat_template")
    return found


def _pre_tokenizer(file: Path, name: str) -> Any:
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    if name == "deepseek-v3":
        return Tokenizer.from_file(str(ASSETS / EMBEDDED_MODEL / "tokenizer.json")).pre_tokenizer
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name not in EXPRESSIONS:
        known = ", ".join(("deepseek-v3", "gpt-2", "smollm", *EXPRESSIONS))
        raise InputError(f"{file}: pre-tokenizer {name!r} is none of {known}; {OR_REFERENCE}")
    split = pre_tokenizers.Split(Regex(EXPRESSIONS[name]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _config(header: GgufHeader) -> dict[str, Any]:
    """Returns config.json's entries in the words of the first family that has such a network; of the first, where none
    has."""
    architecture = header.keys.get("general.architecture")
    configs = [(family, _config_of(header, family)) for family in gguf_families(str(architecture))]
    if not configs:
        raise InputError(
            f"{header.file}: architecture {architecture!r} is not supported; dsquant knows {', '.join(GGUF_FAMILIES)}"
        )
    return next((config for family, config in configs if family.refuse(config) is None), configs[0][1])


def _config_of(header: GgufHeader, family: Family) -> dict[str, Any]:
    file, architecture, numbers = header.file, family.gguf.architecture, header.numbers

    def key(name: str, default: Any = None) -> Any:
        value = numbers.get(name, default)
        if value is None:
            raise InputError(f"{file}: key '{architecture}.{name}' is missing; {OR_REFERENCE}")
        if not isinstance(value, int | float) or not 0 <= value <= LARGEST_NUMBER:
            raise InputError(f"{file}: key '{architecture}.{name}' is {value!r:.80}, expected a number")
        return value

    heads = key("attention.head_count")
    if heads < 1:
        raise InputError(f"{file}: key '{architecture}.attention.head_count' is {heads!r}, expected a positive number")
    mtp = key("nextn_predict_layers", 0)
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count") - mtp,
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv", heads),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "rope_theta": key("rope.freq_base", 10000.0),
        "max_position_embeddings": key("context_length"),
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    config |= family.gguf.config(key, header.tensors)
    if family.mtp_key:
        config[family.mtp_key] = 0  # left out
    return config | {"rope_scaling": _rope_scaling(header, family.gguf, config)}


def _rope_scaling(header: GgufHeader, facts: GgufFacts, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns a config's entry for a file's scaling; for llama.cpp it is linear where no type is stated."""
    numbers = header.numbers
    if "rope_freqs.weight" in header.tensors:
        return LLAMA3_ROPE
    kind, factor = numbers.get("rope.scaling.type", "linear"), numbers.get("rope.scaling.factor", 0.0)
    if kind == "none" or not factor:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = numbers.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    found = {"type": kind, "factor": factor, "original_max_position_embeddings": original}
    found |= {name: numbers.get(BOUND_KEYS + name, own) for name, own in BOUNDS.items()}
    rotary = header.rotary
    if facts.split is None:
        plain = math.isclose(rotary.magnitude, yarn_mscale(factor), rel_tol=1e-6)
        return found if plain else found | {"attention_factor": rotary.magnitude}
    mscale = numbers.get("rope.scaling.yarn_log_multiplier", 0.0) / YARN_LOG_FACTOR
    return found | ({"mscale": mscale, "mscale_all_dim": mscale} if mscale else {})


def _check_rotary(header: GgufHeader, config: Mapping[str, Any]) -> None:
    """Refuses a file whose scaling no config can state: llama.cpp would compute something else."""
    try:
        wanted = network_rotary(FAMILIES[architecture_of(config)], config)
    except Exception as error:  # transformers raises of every kind for a config that makes no sense
        raise InputError(f"{header.file}: its keys describe no network: {type(error).__name__}: {error}") from error
    difference = header.rotary.difference(wanted)
    if difference:
        raise InputError(
            f"{header.file}: its rotary embedding is scaled in a way that dsquant does not read back (it finds "
            f"{config['rope_scaling']}: {difference}); {OR_REFERENCE}"
        )
