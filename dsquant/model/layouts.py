"""Brings a checkpoint, however it was saved, to the names and the config of a release.

transformers 5 can save a layer's experts as one tensor, models that also see or hear put the text model under a prefix
and its config under `text_config`, and multi-token-prediction (MTP) layers come under `mtp.`, or not at all. Everything
above sees one tensor a linear under `model.`, and a config that agrees with the files. Only names and places change: an
expert is a range of bytes in the tensor that holds all of them, so that it is read, and hashed, alone.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.model.families import FAMILIES, architecture_of, mtp, unsupported
from dsquant.model.families.family import Family
from dsquant.model.fp8_layouts import in_deepseeks_words, under_deepseeks_names
from dsquant.model.structure import layer_number
from dsquant.source.checkpoint import CONFIG_FILE, FP8, block_size
from dsquant.source.shards import ShardIndex, TensorInfo

# Where wrappers keep the config of their text model.
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
# What they may say for all their parts.
SHARED_KEYS = (
    "quantization_config", "torch_dtype", "dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"
)  # fmt: skip
# Wrappers may leave out what is transformers' default, on which engines and GGUF's keys cannot rely.
NEEDED_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# transformers 5.24 saves a Kimi-K2.5 with the names of its vision tower's layers, blocks, in the text model too.
_NORM = re.compile(r"(?P<body>.*?)(?:layers|blocks)\.\d+\.input_layernorm\.weight")
_BODY = re.compile(r"(?:layers|blocks)\.(?P<layer>.+)|(?:embed_tokens|norm)\..+")
_MTP = re.compile(r"(?:layers\.)?(?:(?P<number>\d{1,9})\.)?(?P<rest>.+)")
_FUSED = re.compile(r"(?P<experts>model\.layers\.\d+\.mlp\.experts\.)(?P<name>\w+?)(?P<scales>_scale_inv)?")


def text_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the text model's config, config.json itself or a part of a wrapper's, as its own release would have it.

    Raises InputError where a wrapper's text model is not supported, or left without its sizes.
    """
    key = next((key for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), None)
    if key is None or architecture_of(config) in FAMILIES:
        return _renamed(folder, config)
    inner = config[key]
    architecture, model_type = architecture_of(inner), inner.get("model_type")
    if architecture not in FAMILIES:
        architecture = next((name for name, family in FAMILIES.items() if model_type in family.model_types), "")
    if not architecture:
        raise unsupported(folder, f"{architecture_of(config)!r} with a text model {model_type!r} in its {key}")
    missing = [name for name in NEEDED_KEYS if inner.get(name) is None]
    if missing:
        raise InputError(f"{folder / CONFIG_FILE}: {key} lacks {', '.join(missing)}; write there what the model has")
    shared = {name: config[name] for name in SHARED_KEYS if name in config}
    return _renamed(folder, {**shared, **inner, "architectures": [architecture]})


def _renamed(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with a release's words for what others write in their own; raises InputError where its
    `quantization_config` is no object."""
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise InputError(
            f"{folder / CONFIG_FILE}: quantization_config must be an object, found {quantization!r:.80}; take "
            "config.json from the same release as the weights"
        )
    config = in_deepseeks_words(folder, config)
    family = FAMILIES.get(architecture_of(config))
    names = {other: name for other, name in family.renamed.items() if name not in config} if family else {}
    return {names.get(key, key): value for key, value in config.items()}


@dataclass(frozen=True)
class _Places:
    """Where a checkpoint has its text model."""

    body: str
    """The prefix of `layers.0.`; `model.` in a release."""
    num_layers: int
    """Decoder layers, behind which MTP layers are counted."""

    @property
    def root(self) -> str:
        """The prefix of the names of body and head; nothing where they share that with other models."""
        return self.body.removesuffix("model.") if self.body != "model." else ""

    def released_name(self, name: str) -> str | None:
        """Returns the name in a release; None for what is not a part of the text model."""
        if name.startswith(self.body) and (inside := _BODY.fullmatch(name.removeprefix(self.body))):
            return f"model.layers.{inside['layer']}" if inside["layer"] else f"model.{inside[0]}"
        for part in ("mtp", "lm_head"):
            outer, found, rest = f".{name}".partition(f".{part}.")
            if found and self.body.startswith(f"{outer}.".lstrip(".")):
                return self._mtp_name(rest) if part == "mtp" else f"lm_head.{rest}"
        return None

    def _mtp_name(self, rest: str) -> str | None:
        """Numbers count from 0 or go on behind the decoder's; a single layer may have none."""
        inside = _MTP.fullmatch(rest)
        if inside is None:
            return None
        number = int(inside["number"] or 0)
        return f"model.layers.{number if number >= self.num_layers else self.num_layers + number}.{inside['rest']}"


def as_released(
    folder: Path, config: Mapping[str, Any], index: ShardIndex
) -> tuple[dict[str, Any], ShardIndex, tuple[str, ...]]:
    """Brings a checkpoint of a supported architecture to the names and the config of a release.

    Returns config, index (unchanged where it is a release's already), and notes for the user. Raises InputError where
    two tensors are the same part of the model, or fused experts are not in transformers' layout.
    """
    released = text_config(folder, config)
    family = FAMILIES[str(architecture_of(released))]
    wrapped = architecture_of(config) not in FAMILIES
    layers = released.get("num_hidden_layers")
    places = _Places(_body(folder, index, wrapped), layers if isinstance(layers, int) else 0)
    tensors: dict[str, TensorInfo] = {}
    beside: Counter[str] = Counter()
    for stored in index.values():
        name = places.released_name(stored.name)
        if name is None and wrapped and not (places.root and stored.name.startswith(places.root)):
            beside[_module(stored.name)] += 1
            continue
        for tensor in _unfused(released, family, replace(stored, name=name or stored.name, stored_name=stored.name)):
            if tensor.name in tensors:
                raise InputError(
                    f"{tensor.path}: tensors {stored.name!r} and {tensors[tensor.name].stored_name!r} are both "
                    f"{tensor.name!r} of the model; take one of them out"
                )
            tensors[tensor.name] = tensor
    if any(name != info.stored_name for name, info in tensors.items()) or beside:
        index = ShardIndex(folder, dict(sorted(tensors.items())))
    _check_fused_scales(folder, released, family, index)
    in_fp8 = (released.get("quantization_config") or {}).get("quant_method") == "fp8"
    index, scale_notes = under_deepseeks_names(index) if in_fp8 else (index, ())
    counted, notes = _mtp_in_files(released, family, index)
    return counted, index, _beside_notes(beside) + scale_notes + notes


def _body(folder: Path, index: ShardIndex, wrapped: bool) -> str:
    """Returns the prefix of the decoder's `layers.0.`."""
    matches = (match["body"] for name in index if (match := _NORM.fullmatch(name)))
    bodies = {body for body in matches if not body.endswith("mtp.")}
    bodies = {body for body in bodies if f"{body}embed_tokens.weight" in index} or bodies
    if "model." in bodies or (len(bodies) != 1 and not wrapped):
        return "model."
    if len(bodies) != 1:
        modules = ", ".join(sorted({_module(name) for name in index}))
        raise InputError(
            f"{folder}: the text model that {CONFIG_FILE} describes is not found: {len(bodies)} modules have tensors "
            f"'layers.N.input_layernorm.weight', expected one; the tensors lie under {modules:.300}"
        )
    return bodies.pop()


def _module(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "model" else 1])


def _unfused(config: Mapping[str, Any], family: Family, tensor: TensorInfo) -> Iterator[TensorInfo]:
    """Yields one expert's linears, as ranges of the tensor that holds all experts; any other tensor unchanged."""
    match = _FUSED.fullmatch(tensor.name)
    linears = family.fused_experts.get(match["name"]) if match else None
    if match is None or linears is None:
        yield tensor
        return
    experts, shape = config.get(family.mixture.num_experts) if family.mixture else None, tensor.shape
    if len(shape) != 3 or shape[0] != experts or shape[1] % len(linears):
        raise InputError(
            f"{tensor.path}: tensor {tensor.stored_name!r} has shape {list(shape)}; {CONFIG_FILE} has {experts!r} "
            f"experts, expected [{experts!r}, rows of {' and '.join(linears)}, columns] as transformers saves them"
        )
    part = replace(tensor, shape=(shape[1] // len(linears), shape[2]))
    for number in range(shape[0] * len(linears)):
        expert, linear = divmod(number, len(linears))
        name = f"{match['experts']}{expert}.{linears[linear]}.weight{match['scales'] or ''}"
        yield replace(part, name=name, start=tensor.start + number * part.num_bytes)


def _check_fused_scales(folder: Path, config: Mapping[str, Any], family: Family, index: ShardIndex) -> None:
    """Refuses FP8 scales that may be of blocks which reach from the rows of one fused linear into those of the next."""
    quantization = config.get("quantization_config")
    block = block_size(folder, quantization) if isinstance(quantization, dict) else None
    if block is None:
        return
    fused = {name: len(linears) for name, linears in family.fused_experts.items() if len(linears) > 1}
    for weight in index.values():
        count = fused.get(weight.stored_name.rpartition(".")[2])
        if count is None or weight.dtype != FP8:
            continue
        rows = weight.shape[0]
        if rows % block[0] and count * -(-rows // block[0]) == -(-count * rows // block[0]):
            raise InputError(
                f"{weight.path}: tensor {weight.stored_name!r} holds {count} linears of {rows} rows in FP8 blocks of "
                f"{block[0]} rows, which may reach from one linear into the next; save the experts one by one"
            )


def _beside_notes(beside: Mapping[str, int]) -> tuple[str, ...]:
    if not beside:
        return ()
    parts = ", ".join(f"{name} ({count} tensors)" for name, count in sorted(beside.items()))
    return (f"the text model alone is read; what lies beside it is left out: {parts}",)


def _mtp_in_files(config: dict[str, Any], family: Family, index: ShardIndex) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the config with as many MTP layers as the files have."""
    decoder, announced = config.get("num_hidden_layers"), config.get(family.mtp_key) or 0
    if not family.mtp_key or type(decoder) is not int or type(announced) is not int:
        return config, ()
    found: dict[int, set[str]] = {}
    for name, info in index.items():
        number = layer_number(name)
        if number is not None and number >= decoder:
            found.setdefault(number, set()).update({name.split(".")[3], *info.stored_name.split(".")})
    count = 0
    # Whatever is announced, a layer has to show by its parts, or its prefix, that it is not one decoder layer more.
    while found.get(decoder + count, set()) & {*mtp.PARTS, "mtp"}:
        count += 1
    if count == announced:
        return config, ()
    announces = f"{CONFIG_FILE} announces {announced or 'no'} multi-token-prediction layer{'s' * (announced != 1)}"
    if count == 0:
        return {**config, family.mtp_key: 0}, (f"{announces}, the files hold none: the model is taken as one without",)
    return {**config, family.mtp_key: count}, (f"{announces}, the files hold {count}: these are taken as announced",)
