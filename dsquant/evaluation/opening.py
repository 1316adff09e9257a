"""Opens the models that an evaluation compares, and refuses candidates that are not the same model in other storage."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsquant.calibration.texts import load_tokenizer
from dsquant.errors import InputError
from dsquant.evaluation.gguf_candidate import check_same_network, check_same_tensors
from dsquant.files.foreign import find_file
from dsquant.formats.checkpoints import format_of_config, open_checkpoint
from dsquant.formats.gguf.gguf_checkpoint import gguf_checkpoint, gguf_tokenizer, read_header
from dsquant.formats.gguf.gguf_weights import gguf_file, gguf_parts, open_gguf
from dsquant.kernels.activation_rounding import unrounded
from dsquant.model.complete import COMPUTED_SUFFIX, HEAD, check_complete
from dsquant.model.families import FAMILIES
from dsquant.model.repeated import check_repeated
from dsquant.model.skeleton import Skeleton, network_config, network_rotary
from dsquant.model.streaming import EMBEDDING
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.locate import locate
from dsquant.source.shards import ShardIndex
from dsquant.source.vocabulary import set_embedding_rows
from dsquant.source.weights import CPU, Weights

# Keys of a config that define the network's function: where these differ, the same weights are another model.
NETWORK_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "hidden_act", "rope_parameters", "tie_word_embeddings", "vocab_size", "attention_bias", "mlp_bias",
    "use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
)  # fmt: skip
# Where an engine begins and ends a text.
TOKEN_KEYS = ("bos_token_id", "eos_token_id")
ENDS_BYTES = 2**20


@dataclass(frozen=True)
class Opened:
    """A model's weights and the facts that its files state."""

    path: str
    """As the caller gave it."""
    format: str
    """Such as FP8, BF16 or `AWQ 4 bits, groups of 128`."""
    weights: Weights
    size_bytes: int
    """Data of all its tensors, from the headers: the size that `plan` and a job's tables give a source. The files are
    larger by their headers."""
    files: tuple[Path, ...]
    """The files that hold its tensors."""
    index: ShardIndex | None = None
    """None for GGUF, whose reader counts no bytes."""
    engines_round: bool = False
    """Whether config.json has engines round what packed linears read, which no evaluation does."""
    notes: tuple[str, ...] = ()
    """What the format's name does not show."""

    @property
    def bytes_read(self) -> int:
        """Tensor data read so far; 0 where it is not counted."""
        return 0 if self.index is None else self.index.bytes_read

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per weight."""
        return 8 * self.size_bytes / sum(math.prod(self.weights.shape(name)) for name in self.weights)

    @property
    def rounds_activations(self) -> bool:
        """Whether activations are rounded where they meet some of its weights."""
        return any(self.weights.activation_quantizer(name) is not unrounded for name in self.weights)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of each file's name, size, first and last MiB: distinguishes models without reading them whole."""
        digest = hashlib.sha256()
        for file in self.files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as content:
                digest.update(content.read(ENDS_BYTES))
                content.seek(max(0, size - ENDS_BYTES))
                digest.update(content.read())
        return digest.hexdigest()


@dataclass(frozen=True)
class Original:
    """The reference, with everything that candidates are run through."""

    opened: Opened
    checkpoint: Checkpoint
    skeleton: Skeleton
    tokenizer: Any


def open_original(path: str, device: torch.device = CPU) -> Original:
    """Opens the reference: a folder, a hub id, `tiny-r1`, a GGUF file or a folder with one.

    Its weights and the candidates' go to `device` when they are read. Raises InputError where it is missing, damaged,
    incomplete, or of a family that dsquant does not know.
    """
    file = gguf_file(Path(path).expanduser())
    if file is None:
        checkpoint = open_checkpoint(locate(path), device)
        opened = _opened(path, checkpoint)
        tokenizer = load_tokenizer(checkpoint.folder)
    else:
        header = read_header(file)
        checkpoint = gguf_checkpoint(header, device)
        opened = Opened(path, header.format, checkpoint.weights, header.num_bytes, tuple(gguf_parts(file)))
        tokenizer = gguf_tokenizer(header)
    skeleton = Skeleton(checkpoint)
    check_complete(checkpoint, skeleton, mtp="drop")  # it is not evaluated
    check_repeated(checkpoint, skeleton)
    set_embedding_rows(tokenizer, _num_tokens(checkpoint.weights))
    return Original(opened, checkpoint, skeleton, tokenizer)


def open_candidate(path: str, original: Original) -> Opened:
    """Opens a candidate under the original's parameter names: a folder, a hub id, `tiny-r1`, a GGUF file or a folder
    with one.

    Raises InputError where it cannot be read, or is not the same model: architecture, vocabulary, config or shapes
    differ.
    """
    file = gguf_file(Path(path).expanduser())
    device = original.checkpoint.weights.device
    if file is None:
        checkpoint = open_checkpoint(locate(path), device)
        _check_architecture(path, checkpoint.architecture, original)
        _check_vocabulary(path, _num_tokens(checkpoint.weights), _checkpoint_tokens(checkpoint), original)
        _check_network(checkpoint, original)
        check_repeated(checkpoint, original.skeleton)
        opened = _opened(path, checkpoint)
    else:
        header = read_header(file)
        if header.keys.get("general.type") == "imatrix":
            raise InputError(f"{path} is an importance matrix, not a model; leave it out")
        _check_architecture(path, header.architecture, original)
        _check_vocabulary(path, header.num_tokens, header.tokens, original)
        reference, network = original.opened.path, original.skeleton.config
        rotary = network_rotary(original.skeleton.family, original.checkpoint.config)
        check_same_network(header, reference, network, rotary)
        check_same_tensors(header, reference, network, original.checkpoint.weights)
        weights = open_gguf(file, original.checkpoint)
        parts = tuple(gguf_parts(file))
        opened = Opened(path, header.format, weights, header.num_bytes, parts, notes=header.notes)
    _check_shapes(path, opened.weights, original.skeleton)
    return opened


def _opened(path: str, checkpoint: Checkpoint) -> Opened:
    files = tuple(sorted({info.path for info in checkpoint.index.values()}))
    index, known = checkpoint.index, format_of_config(checkpoint.config)
    rounds = known is not None and known.rounds_inputs(checkpoint.config["quantization_config"])
    return Opened(path, _stored_format(checkpoint), checkpoint.weights, index.num_bytes, files, index, rounds)


def _stored_format(checkpoint: Checkpoint) -> str:
    known = format_of_config(checkpoint.config)
    if known is not None:
        return known.described(checkpoint.config["quantization_config"])
    sizes: Counter[str] = Counter()
    for info in checkpoint.index.values():
        sizes[info.dtype] += info.num_bytes
    return {"F8_E4M3": "FP8"}.get(found := sizes.most_common(1)[0][0], found)


def _check_architecture(path: str, architecture: str, original: Original) -> None:
    wanted = original.checkpoint.architecture
    if architecture == wanted:
        return
    files = [Path(name).expanduser() for name in (path, original.opened.path)]
    stored = [FAMILIES[name].gguf.architecture if name in FAMILIES else name for name in (architecture, wanted)]
    if not any(map(gguf_file, files)) or stored[0] != stored[1]:  # some share a network, and its name in GGUF
        raise InputError(
            f"{path}: architecture {architecture}, the reference {original.opened.path} is {wanted}; not the same model"
        )


def _check_network(checkpoint: Checkpoint, original: Original) -> None:
    """Refuses a config of the same architecture with other numbers."""
    family = original.skeleton.family
    try:
        found = {**family.stated, **network_config(family, checkpoint.config)}
        rotary = network_rotary(family, checkpoint.config)
    except Exception as error:  # transformers raises of every kind for a config that makes no sense
        raise InputError(f"{checkpoint.folder / 'config.json'}: {type(error).__name__}: {error}") from error
    from_gguf = gguf_file(Path(original.opened.path).expanduser()) is not None
    wanted = {**family.stated, **original.skeleton.config}
    keys = [*NETWORK_KEYS, *family.network_keys, *(vars(family.mixture).values() if family.mixture else ())]
    for key in keys if from_gguf else [*keys, *TOKEN_KEYS]:
        same = _same(found.get(key), wanted.get(key))
        if key == "rope_parameters" and from_gguf:  # which writes scaling in other keys, and leaves defaults out
            reference = network_rotary(family, original.checkpoint.config)
            kinds = {found[key]["rope_type"], wanted[key]["rope_type"]}
            same = len(kinds) == 1 and reference.difference(rotary) is None
        if not same:
            raise InputError(
                f"{checkpoint.folder / 'config.json'}: {key} is {found.get(key)!r}, the reference's is "
                f"{wanted.get(key)!r}; not the same model"
            )


def _same(found: Any, wanted: Any) -> bool:
    """Returns whether two values of a config mean the same: GGUF stores single precision."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        keys = (found.keys() | wanted.keys()) - {"type"}  # of rope_type
        return all(_same(found.get(key), wanted.get(key)) for key in keys)
    if isinstance(found, float) or isinstance(wanted, float):
        return found is not None and wanted is not None and math.isclose(found, wanted, rel_tol=1e-5)
    return bool(found == wanted)


def _checkpoint_tokens(checkpoint: Checkpoint) -> Mapping[str, int] | None:
    """Returns token -> id; None where the checkpoint has no tokenizer, which weights can do without."""
    if find_file(checkpoint.folder, "tokenizer.json") is None:
        return None
    return dict(load_tokenizer(checkpoint.folder).get_vocab())


def _num_tokens(weights: Weights) -> int:
    """Returns the number of rows of the embedding; 0 where it is missing, which is refused later."""
    return weights.shape(EMBEDDING)[0] if EMBEDDING in weights else 0


def _check_vocabulary(path: str, rows: int, tokens: Mapping[str, int] | None, original: Original) -> None:
    wanted_rows = _num_tokens(original.checkpoint.weights)
    if rows and rows != wanted_rows:
        raise InputError(
            f"{path}: a vocabulary of {rows} tokens, the reference's has {wanted_rows}; perplexities over different "
            "vocabularies cannot be compared"
        )
    if tokens is None:
        return
    # Tokenizers add tokens of their own when they are loaded, so that one may lack what the other has.
    found = {number: token for token, number in tokens.items()}
    for token, number in original.tokenizer.get_vocab().items():
        if found.get(number, token) != token:
            raise InputError(
                f"{path}: a different vocabulary: token {number} is {found[number]!r}, in the reference {token!r}; "
                "perplexities over different vocabularies cannot be compared"
            )


def _of_mtp(name: str, skeleton: Skeleton) -> bool:
    parts = name.split(".")
    return name.startswith("mtp.") or (parts[1] == "layers" and int(parts[2]) >= skeleton.num_layers)


def _check_shapes(path: str, weights: Weights, skeleton: Skeleton) -> None:
    """Refuses a candidate whose weights are not the reference's in other storage."""
    expected = skeleton.expected_shapes()
    for name in weights:
        repeated = name == HEAD or name.endswith(COMPUTED_SUFFIX)
        if name not in expected and not repeated and not _of_mtp(name, skeleton):
            raise InputError(f"{path}: tensor {name!r} is not part of the reference's network; not the same model")
    for name, shape in expected.items():
        if _of_mtp(name, skeleton):
            continue  # the candidate may have dropped the MTP layer
        if name not in weights:
            raise InputError(f"{path}: tensor {name!r} is missing, which the reference has; not the same model")
        if weights.shape(name) != shape:
            raise InputError(
                f"{path}: tensor {name!r} has shape {list(weights.shape(name))}, the reference's has "
                f"{list(shape)}; not the same model"
            )
