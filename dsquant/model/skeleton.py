"""The network without its weights: transformers' own modules on the meta device.

transformers 5 fuses a layer's experts into 3-D parameters (23 GB for one layer of R1). Here `RoutingTap` takes their
place: it notes which token goes to which expert and leaves the experts' work to `streaming`, one expert at a time.
"""

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from dsquant.errors import InputError, UsageError
from dsquant.model.families import family_of, mtp
from dsquant.model.families.family import Family, MixtureKeys, Sizes
from dsquant.model.fused_attention import ATTENTION, SharedLinear, fused_attention
from dsquant.model.rotary import Rotary, rope_problem, rotary_of, settle_magnitude
from dsquant.model.sparse_attention import replace_indexers
from dsquant.model.structure import DecoderLayer
from dsquant.source.checkpoint import Checkpoint

# Config keys that name remote code or a storage format; the skeleton wants neither.
# What the network is built without. A padding token's row is a row like any other, and may lie beyond the embedding.
IGNORED_CONFIG = ("quantization_config", "auto_map", "torch_dtype", "dtype", "pad_token_id")
# The largest count of layers, or of anything where no tensor could contradict it; Kimi-K2 has 384 experts.
LARGEST_COUNT = 1024
# The largest extent of a weight: many times that of any vocabulary.
LARGEST_EXTENT = 2**22
SIZE_KEY = re.compile(r"_(size|dim|rank|heads)")

RoutingSink = Callable[[torch.Tensor, torch.Tensor], None]


class RoutingTap(nn.Module):
    """Stands for a layer's routed experts: reports the routing, contributes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sink: RoutingSink | None = None

    def forward(self, hidden_TH: torch.Tensor, expert_TK: torch.Tensor, share_TK: torch.Tensor) -> torch.Tensor:
        """Reports each token's experts and their shares to `sink`; returns zeros for the experts' output."""
        if self.sink is not None:
            self.sink(expert_TK, share_TK)
        return torch.zeros_like(hidden_TH)


class Skeleton:
    """transformers' modules on the meta device, and the structure of every layer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Builds the modules of a checkpoint, loads no weight; raises InputError where its config is not supported."""
        self.family: Family = family_of(checkpoint.folder, checkpoint.config)
        _check_counts(self.family, checkpoint)
        _check_values(checkpoint)
        try:
            self._build(checkpoint)
        except (InputError, ImportError):
            raise
        except Exception as error:  # transformers and torch raise of every kind for a config that makes no sense
            path = checkpoint.folder / "config.json"
            raise InputError(f"{path}: no network can be built from it: {type(error).__name__}: {error}") from error

    def _build(self, checkpoint: Checkpoint) -> None:
        self.num_mtp_layers = self.family.num_mtp_layers(checkpoint.config)
        hf_config = _hf_config(self.family, checkpoint.config)
        self.config: dict[str, Any] = {**checkpoint.config, **network_config(self.family, checkpoint.config)}
        self.sizes: Sizes = self.family.sizes(self.config)
        self.num_layers: int = hf_config.num_hidden_layers
        # The MTP layer is one more decoder layer: built beside the others, run only when asked for.
        _add_layers(self.family, hf_config, self.num_mtp_layers)
        self.model = _meta_model(hf_config)
        if self.family.sparse is not None:
            replace_indexers(self.model, self.family.sparse.rotates_neighbours)
        _check_extents(checkpoint, self.model)  # before the structure has an entry for each row
        self.layers = tuple(
            self.family.layer(self.config, index) for index in range(self.num_layers + self.num_mtp_layers)
        )
        for layer in self.layers:
            if layer.router is not None:
                self.model.set_submodule(layer.experts_module, RoutingTap())

    def check_length(self, num_tokens: int) -> None:
        """Raises UsageError where samples of so many tokens cannot pass layer by layer."""
        longest = self.family.sparse.longest_sample(self.config) if self.family.sparse else None
        if longest is not None and num_tokens > longest:
            raise UsageError(
                f"samples of {num_tokens} tokens: {self.family.architecture} has layers that share an indexer's choice "
                f"of keys, which dsquant runs on samples of up to {longest} tokens, where all keys are seen; lower "
                "--seq-len"
            )

    def module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def activation(self, values: torch.Tensor) -> torch.Tensor:
        """The MLPs' activation function."""
        from transformers.activations import ACT2FN

        return ACT2FN[self.config["hidden_act"]](values)

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight of the decoder, which a complete checkpoint has."""
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())
            if not name.startswith("model.rotary_emb")
        }
        if self.config.get("tie_word_embeddings"):
            shapes.pop("lm_head.weight", None)
        for layer in self.layers:
            shapes.update(self._expert_shapes(layer))
        for layer in self.layers[self.num_layers :]:
            shapes |= {f"{layer.prefix}.{name}.weight": shape for name, shape in mtp.shapes(self.config).items()}
        return shapes

    @property
    def optional(self) -> frozenset[str]:
        """Weights that a complete checkpoint may lack: tables of MTP layers for which the decoder's stand."""
        layers, names = self.layers[self.num_layers :], self.family.mtp_shared
        return frozenset(f"{layer.prefix}.{name}.weight" for layer in layers for name in names)

    def _expert_shapes(self, layer: DecoderLayer) -> dict[str, tuple[int, ...]]:
        hidden, width = self.config["hidden_size"], self.sizes.expert_width
        shapes: dict[str, tuple[int, ...]] = {}
        for mlp in layer.experts:
            shapes[f"{mlp.gate}.weight"] = shapes[f"{mlp.up}.weight"] = (width, hidden)
            shapes[f"{mlp.down}.weight"] = (hidden, width)
        return shapes


def _check_counts(family: Family, checkpoint: Checkpoint) -> None:
    """Refuses counts and sizes that the tensors cannot bear out, before anything is built in such numbers."""
    path, config, tensors = checkpoint.folder / "config.json", checkpoint.config, len(checkpoint.weights)
    names = family.mixture or MixtureKeys("", num_dense_layers="")
    most = {"num_hidden_layers": LARGEST_COUNT, family.mtp_key: LARGEST_COUNT, names.num_experts: tensors}
    for key, limit in most.items():
        count, limit = config.get(key), min(limit or LARGEST_COUNT, tensors or LARGEST_COUNT)
        if count is not None and not (isinstance(count, int) and 0 <= count <= limit):
            raise InputError(
                f"{path}: {key} is {count!r:.80}; the checkpoint has {tensors} tensors in all; config and weights are "
                "of different models"
            )
    dense = config.get(names.num_dense_layers)
    mixtures = (config.get("num_hidden_layers") or 0) - (dense if isinstance(dense, int) else 0)
    experts = mixtures * (config.get(names.num_experts) or 0)
    if tensors and experts > tensors:
        raise InputError(
            f"{path}: num_hidden_layers and {names.num_experts} make {experts} experts; the checkpoint has {tensors} "
            "tensors in all; config and weights are of different models"
        )
    for key, size in config.items():
        sized = size is None or (isinstance(size, int) and 0 <= size <= LARGEST_EXTENT)
        if SIZE_KEY.search(key) and not sized:
            raise InputError(f"{path}: {key} is {size!r:.80}, expected an integer from 0 to {LARGEST_EXTENT}")


def _check_extents(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuses modules that are larger than any weight, or not of the size of the checkpoint's weights."""
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name in checkpoint.weights:
            check_shape(checkpoint, name, shape)
        if max(shape, default=0) > LARGEST_EXTENT:
            raise InputError(
                f"{checkpoint.folder / 'config.json'}: makes tensor {name!r} of shape {list(shape)}, larger than any; "
                "take config.json from the same release as the weights"
            )


def check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    """Raises InputError where a weight has another shape than config.json gives it."""
    found = checkpoint.weights.shape(name)
    if found != shape:
        info = checkpoint.index.get(name)
        path, label = (info.path, info.label) if info else (checkpoint.folder, repr(name))
        raise InputError(
            f"{path}: tensor {label} has shape {list(found)}, config.json makes it {list(shape)}; config and weights "
            "are of different models"
        )


def _check_values(checkpoint: Checkpoint) -> None:
    """Refuses values that transformers takes but that cannot be meant."""
    path, config = checkpoint.folder / "config.json", checkpoint.config
    for key in ("torch_dtype", "dtype"):
        name = config.get(key)
        if name is not None and not isinstance(getattr(torch, str(name).removeprefix("torch."), None), torch.dtype):
            raise InputError(f"{path}: {key} {name!r:.80} is no type of PyTorch; write bfloat16, or leave it out")
    problem = rope_problem(config)
    if problem:
        raise InputError(f"{path}: {problem}")
    rows = config.get("vocab_size")
    for key in ("bos_token_id", "eos_token_id"):
        found = config.get(key)
        for number in found if isinstance(found, list) else [found]:
            if number is not None and not (isinstance(number, int) and 0 <= number < (rows or 0)):
                raise InputError(f"{path}: {key} is {number!r:.80}, the vocabulary has the tokens 0 to vocab_size - 1")


def network_config(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Brings a config.json into the current form of transformers, defaults filled in, under a release's names."""
    found = dict(_hf_config(family, config).to_dict())
    found |= {name: found[other] for other, name in family.renamed.items() if other in found}
    head_dim = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
    return found | {"head_dim": head_dim}


def network_rotary(family: Family, config: Mapping[str, Any]) -> Rotary:
    """Returns the rotary embedding of the network that a config.json describes."""
    hf_config = _hf_config(family, config)
    return rotary_of(hf_config, family.score_scale(hf_config))


def _hf_config(family: Family, config: Mapping[str, Any]) -> Any:
    import transformers

    # A copy to the bottom: from_dict writes into rope_scaling.
    plain = {key: deepcopy(value) for key, value in config.items() if key not in IGNORED_CONFIG}
    hf_config = getattr(transformers, family.config_class).from_dict(plain)
    settle_magnitude(hf_config)
    return hf_config


def _add_layers(family: Family, hf_config: Any, count: int) -> None:
    """Adds layers for multi-token prediction behind the last one, and their entries to lists that have one for each."""
    layers = hf_config.num_hidden_layers
    for key, value in vars(hf_config).items():
        if isinstance(value, list) and len(value) == layers and key.endswith("_types"):
            setattr(hf_config, key, [*value, *[family.mtp_types.get(key, value[-1])] * count])
    hf_config.num_hidden_layers = layers + count


def _meta_model(hf_config: Any) -> Any:
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, fused_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    # Not accelerate's init_empty_weights: it allocates each parameter before it drops it, and the fused experts of one
    # R1 layer are 30 GB, more than many a machine gives.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            hf_config, dtype=torch.float32, attn_implementation=ATTENTION, trust_remote_code=False
        )
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = SharedLinear
    # Rotary buffers are computed, not loaded: they are real.
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config)
    return model.eval()
