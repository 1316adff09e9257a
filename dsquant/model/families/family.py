"""What dsquant knows of an architecture, as data and small functions: one `Family` each, composed of parts that several
share (`gqa`, `mla`, `mlps`, `mtp`).
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dsquant.model.rotary import score_scale
from dsquant.model.structure import DecoderLayer

Config = Mapping[str, Any]
"""config.json's content; where numbers are written down for llama.cpp, with transformers' defaults filled in."""
# GGUF's names of a layer's norms in most architectures.
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


@dataclass(frozen=True)
class Cache:
    """What attention keeps of a token in one layer."""

    key_value_heads: int
    num_values: int
    """576 for R1: the latent and the rotary key."""
    is_shared: bool
    """Whether all heads share them, so that every tensor-parallel rank keeps them all."""


@dataclass(frozen=True)
class MixtureKeys:
    """What configs call the numbers of mixtures of experts; empty where a family has nothing of the kind."""

    num_experts: str = "n_routed_experts"
    experts_per_token: str = "num_experts_per_tok"
    expert_width: str = "moe_intermediate_size"
    num_shared_experts: str = "n_shared_experts"
    num_dense_layers: str = "first_k_dense_replace"
    """Layers before the first mixture."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of a network that say which parts it has, whatever its config calls them."""

    cache: Cache
    num_heads: int
    """Heads of queries."""
    num_experts: int = 0
    """Routed experts of a layer; 0 for a dense network, and so the next four."""
    experts_per_token: int = 0
    expert_width: int = 0
    num_shared_experts: int = 0
    num_dense_layers: int = 0
    """Layers before the first mixture."""

    def tensor_parallel(self, gpus: int) -> int:
        """Among how many of so many GPUs engines divide a layer: a divisor of their number. Each has as many query
        heads; a head of keys and values is in one of them, or copied to as many as any other (vLLM 0.33,
        `QKVParallelLinear`)."""
        shared = self.cache.key_value_heads
        return next(
            ranks
            for ranks in range(gpus, 0, -1)
            if gpus % ranks == 0 and self.num_heads % ranks == 0 and (shared % ranks == 0 or ranks % shared == 0)
        )


@dataclass(frozen=True)
class SparseAttention:
    """That an indexer chooses the keys that each query sees; `model.sparse_attention` runs it."""

    rotates_neighbours: bool
    """Whether the indexer rotates pairs of neighbouring dimensions, as latent attention does; or pairs of halves."""
    most_keys: str = "index_topk"
    """What configs call the number of keys that a query sees."""
    types: str = "indexer_types"
    """What they call the list of layers that have an indexer, `full`, or share an earlier one's choice."""

    def longest_sample(self, config: Config) -> int | None:
        """The most tokens of a sample that passes layer by layer; None for any number.

        Choices of more tokens would have to be kept for the layers that share them.
        """
        return int(config[self.most_keys]) if "shared" in (config.get(self.types) or ()) else None


class ReadKey(Protocol):
    """Reads a number of a GGUF file by its key, without the architecture's name; raises InputError where it lacks one
    that has no default.
    """

    def __call__(self, name: str, default: Any = None) -> Any: ...


@dataclass(frozen=True)
class SplitLinear:
    """A linear with keys and values of each head in its rows, which GGUF stores as two tensors: MLA's kv_b_proj."""

    module: str
    """Its name inside a layer."""
    keys: str
    values: str
    """The tensors' names inside a block."""
    shape: Callable[[Config], tuple[int, int, int, int]]
    """Heads, rows of a head's keys and of its values, columns."""


@dataclass(frozen=True)
class GgufFacts:
    """How llama.cpp stores and computes an architecture, beside what all architectures share."""

    architecture: str
    """`general.architecture`."""
    modules: Mapping[str, str]
    """Module inside a layer -> tensor inside a block; routed experts, the router's bias and a split linear apart."""
    keys: Callable[[Config], dict[str, Any]]
    """The network's numbers, in the order of the file, behind those that every architecture has."""
    config: Callable[[ReadKey, Collection[str]], dict[str, Any]]
    """The reverse of `keys`: config.json's entries from a file's numbers and the names of its tensors."""
    rope_scalings: tuple[str, ...] = ("default", "linear", "yarn")
    """Kinds of scaling that its keys can say."""
    biases: tuple[str, ...] = ()
    """Modules whose biases it reads; it loads no file with others."""
    problems: Callable[[Config], Iterable[str]] = field(default=lambda config: ())
    """Numbers that llama.cpp does not load or takes for others, in words."""
    interleaved: tuple[str, ...] = ()
    """Modules whose rows are stored with the two halves of each head's rotary dimensions interleaved."""
    pre_tokenizers: Mapping[str, str] = field(default_factory=dict)
    """llama.cpp's name of a way to cut text -> its name for the tokenizers of this architecture, which begin no text
    with a token of their own."""
    split: SplitLinear | None = None
    """Where attention is over latents, whose scores llama.cpp scales in its own way."""


@dataclass(frozen=True)
class Family:
    """An architecture that dsquant knows."""

    architecture: str
    releases: str
    """The models that have it, as README's table names them."""
    config_class: str
    """Name of the configuration class in transformers."""
    model_types: tuple[str, ...]
    """`model_type` of its configs: by these a wrapper names its text model."""
    layer: Callable[[Config, int], DecoderLayer]
    """Builds layer `index` from config.json's content."""
    cache: Callable[[Config], Cache]
    gguf: GgufFacts
    mixture: MixtureKeys | None = None
    """None where all its networks are dense."""
    score_scale: Callable[[Any], float] = score_scale
    """The factor on attention's scores, from transformers' configuration."""
    sparse: SparseAttention | None = None
    """None where queries see all keys up to themselves."""
    mtp_key: str = ""
    """What its configs call the number of multi-token-prediction layers behind the decoder's; empty where none has."""
    mtp_types: Mapping[str, str] = field(default_factory=dict)
    """Lists of configs with an entry for each layer -> the entry of such a layer, where it is not the last one's."""
    mtp_shared: tuple[str, ...] = ()
    """Modules of such a layer that a release may leave out, since the decoder's are meant."""
    states: tuple[str, ...] = ()
    """Keys that mean something here and are refused in configs of other families (`FOREIGN`)."""
    stated: Mapping[str, Any] = field(default_factory=dict)
    """What engines read of a config and releases may leave out, with the only value that is supported."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Keys of configs that transformers 5 has written -> what releases call them."""
    network_keys: tuple[str, ...] = ()
    """What its configs say about the network's function beside what those of all architectures do."""
    packed_types: tuple[str, ...] = ()
    """`model_type`s whose releases are of 4 bits themselves, in the layout of compressed-tensors."""
    in_fp8: tuple[str, ...] = ()
    """Modules that are never quantized and that FP8 releases store in FP8 all the same."""
    fused_experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The tensors [experts, rows, columns] in which transformers may save a layer's experts -> the linears whose rows
    follow one another in each."""
    refuse: Callable[[Config], str | None] = field(default=lambda config: None)
    """What in a config is not supported, in words; None where all is."""

    def sizes(self, config: Config) -> Sizes:
        """The numbers of the network that a config describes."""
        numbers = {}
        if self.is_mixture(config):
            names = {name: key for name, key in vars(self.mixture).items() if key}
            numbers = {name: int(config.get(key) or 0) for name, key in names.items()}
        return Sizes(self.cache(config), int(config["num_attention_heads"]), **numbers)

    def num_mtp_layers(self, config: Config) -> int:
        """Multi-token-prediction layers that a config announces."""
        return int(config.get(self.mtp_key) or 0) if self.mtp_key else 0

    def is_mixture(self, config: Config) -> bool:
        """Whether a config describes a network with routed experts."""
        return self.mixture is not None and bool(config.get(self.mixture.num_experts))
