"""Describes a decoder layer as data: the families fill it in, the algorithms read nothing else.

All names are full: modules as `model.layers.3.mlp.up_proj`, parameters with `.weight` or `.bias` behind.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

MlpKind = Literal["dense", "shared", "routed"]
# Behind kv_b_proj's name: the importance of its keys, which in llama.cpp multiply queries and not the latent.
KEYS_SUFFIX = ".keys"
ROUTER = "mlp.gate"
"""A router's module inside a layer."""
# Of a router, behind its module's name: what is added to the scores by which experts are chosen, and to no share.
ROUTER_BIAS = "e_score_correction_bias"
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\..+")


def layer_number(name: str) -> int | None:
    """Returns the number of the layer that a parameter belongs to; None where it belongs to none."""
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class ScaleGroup:
    """Linears that read one input, and the producer whose output channels can absorb a scale.

    Dividing the producer's channels by s and multiplying the columns of everything that reads them by s leaves the
    function unchanged; a reader that is left out changes it, as routers that were forgotten have shown (llm-compressor
    PR 2451).
    """

    producer: str
    """Module whose output rows are divided: a norm, or a linear."""
    consumers: tuple[str, ...]
    """Linears whose input columns are multiplied."""
    followers: tuple[str, ...] = ()
    """Parameters that read the same input and are never quantized (a router), but are multiplied all the same."""
    producer_rows: tuple[int, ...] | None = None
    """The producer's row behind each input column; None where row j feeds column j of all columns."""


@dataclass(frozen=True)
class Mlp:
    """A gated MLP: down(act(gate(x)) * up(x))."""

    kind: MlpKind
    gate: str
    up: str
    down: str
    expert: int | None = None
    """Number of a routed expert."""

    @property
    def inner(self) -> ScaleGroup:
        """The scale group inside the MLP: a factor on a row of up passes through the product to a column of down."""
        return ScaleGroup(self.up, (self.down,))

    @property
    def linears(self) -> tuple[str, str, str]:
        return self.gate, self.up, self.down


def gates_and_ups(mlps: Iterable[Mlp]) -> tuple[str, ...]:
    """Returns the linears that read the MLPs' input."""
    return tuple(linear for mlp in mlps for linear in (mlp.gate, mlp.up))


@dataclass(frozen=True)
class Absorbed:
    """Of MLA: linears between which engines multiply before they multiply with activations."""

    queries: str
    """Makes the heads' queries, the part without position first."""
    keys_and_values: str
    """kv_b_proj: engines multiply its keys with queries, and its values with mixed latents."""
    num_heads: int
    key_rows: int
    """Of each head, the rows of `keys_and_values` that make keys: they come first."""


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer."""

    index: int
    attention: tuple[ScaleGroup, ...]
    """The scale groups inside attention, in the order of the data flow."""
    attention_linears: tuple[str, ...]
    mlp_norm: ScaleGroup
    """The norm that feeds the MLPs, and all that read it: every gate and up, and the router as a follower."""
    router: str | None
    """The router's weight, where there is one."""
    mlps: tuple[Mlp, ...]
    """The dense MLP; or the shared expert and every routed expert."""
    absorbed: Absorbed | None = None
    """None without latent attention."""

    @property
    def prefix(self) -> str:
        return f"model.layers.{self.index}"

    @property
    def attention_module(self) -> str:
        """transformers' module of attention."""
        return f"{self.prefix}.self_attn"

    @property
    def attention_output(self) -> str:
        """The linear whose outputs are added to the hidden states."""
        return self.attention[-1].consumers[-1]

    @property
    def mlp_module(self) -> str:
        """transformers' module that reads the norm's output: the MLP, or router and experts."""
        return f"{self.prefix}.mlp"

    @property
    def experts_module(self) -> str:
        """transformers' module of the routed experts, called with hidden states, experts and shares."""
        return f"{self.mlp_module}.experts"

    @property
    def norm(self) -> str:
        return self.mlp_norm.producer

    @property
    def scale_groups(self) -> tuple[ScaleGroup, ...]:
        """All scale groups, in the order of the data flow."""
        return (*self.attention, self.mlp_norm, *(mlp.inner for mlp in self.mlps))

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear that a preset may quantize."""
        return self.attention_linears + tuple(name for mlp in self.mlps for name in mlp.linears)

    @property
    def experts(self) -> tuple[Mlp, ...]:
        return tuple(mlp for mlp in self.mlps if mlp.kind == "routed")


def absorbed_linears(layers: Iterable[DecoderLayer]) -> frozenset[str]:
    """Returns kv_b_proj of every layer with latent attention."""
    return frozenset(layer.absorbed.keys_and_values for layer in layers if layer.absorbed)


def first_experts(layers: Iterable[DecoderLayer]) -> dict[str, str]:
    """Returns each linear of a routed expert -> the one of its layer's first expert that stands for all of its kind;
    gate and up, which read one input, are of one kind."""
    found: dict[str, str] = {}
    for layer in layers:
        for mlp in layer.experts:
            first = layer.experts[0]
            found |= {mlp.gate: first.up, mlp.up: first.up, mlp.down: first.down}
    return found


def linear_groups(layer: DecoderLayer, quantized: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Returns name -> linears of a layer's groups that its preset quantizes.

    Attention's are those that read one input, since they share their scales; an MLP is one group, since it is judged as
    a whole; a layer's routed experts are one.
    """
    found = {f"{group.consumers[0]}": group.consumers for group in layer.attention}
    found |= {mlp.up.rsplit(".", 1)[0]: mlp.linears for mlp in layer.mlps if mlp.expert is None}
    if layer.experts:
        prefix = layer.experts[0].up.rsplit(".", 2)[0]
        found[prefix] = tuple(linear for mlp in layer.experts for linear in mlp.linears)
    return {name: linears for name, linears in found.items() if quantized and set(linears) <= set(quantized)}
