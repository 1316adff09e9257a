"""Runs decoder layers whose weights lie on disk, for many samples, one expert in memory at a time.

A layer is attention, norms, router, the shared expert or dense MLP (all of it transformers' forward, its weights moved
in by accelerate's hooks) plus the sum of the routed experts' contributions. So it runs in two sweeps: `run_dense_part`
over batches of samples, which also notes every token's experts, and `add_experts` over experts, each fetched once for
all its tokens.

Shape legend: N samples, T tokens of a sample, H hidden size, R tokens of all samples, K experts of a token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dsquant.model.activations import Activations
from dsquant.model.overlays import Overlay, Weights
from dsquant.model.skeleton import RoutingTap, Skeleton
from dsquant.model.structure import DecoderLayer, Mlp

Observer = Callable[[torch.Tensor], None]
"""Gets a module's input, [R, I]."""


@dataclass(frozen=True)
class Routing:
    """Which experts every token reaches."""

    expert_RK: torch.Tensor
    """int16 [R, K]."""
    share_RK: torch.Tensor
    """float32 [R, K]: the weight of each expert in the mixture."""

    def tokens_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that reach an expert.

        Args:
            expert: its number.

        Returns:
            Their rows int64 [n] in ascending order, and the expert's share in each, float32 [n].
        """
        rows_R, places_R = torch.where(self.expert_RK == expert)
        return rows_R, self.share_RK[rows_R, places_R]

    def counts(self, num_experts: int) -> torch.Tensor:
        """Tokens of each expert, int64 [E]."""
        return torch.bincount(self.expert_RK.flatten().long(), minlength=num_experts)


@dataclass(frozen=True)
class Stream:
    """One version of the weights with the hidden states that pass through it."""

    weights: Weights
    inputs: Activations
    outputs: Activations


class _Resident(Overlay):
    """Keeps what is read: a layer's weights outside the experts stay in memory while batches pass."""

    def __init__(self, base: Weights) -> None:
        super().__init__(base)
        self._kept: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._kept:
            self._kept[name] = self.base[name]
        return self._kept[name]


@contextmanager
def _loaded(skeleton: Skeleton, name: str, weights: Weights) -> Iterator[nn.Module]:
    """Hooks a module to the weights: each submodule's parameters come when it runs and go afterwards."""
    from accelerate.hooks import attach_align_device_hook, remove_hook_from_module

    module = skeleton.module(name)
    attach_align_device_hook(
        module,
        execution_device=torch.device("cpu"),
        offload=True,
        weights_map=_Resident(weights),
        offload_buffers=True,
        module_name=name,
    )
    try:
        yield module
    finally:
        remove_hook_from_module(module, recurse=True)


def embed(skeleton: Skeleton, weights: Weights, tokens_NT: torch.Tensor, outputs: Activations) -> None:
    """Stores the embeddings of all samples.

    Args:
        skeleton: the network.
        weights: its weights.
        tokens_NT: int64 [N, T].
        outputs: [N, T, H], written.
    """
    table_VH = weights["model.embed_tokens.weight"]
    for start in range(len(tokens_NT)):
        outputs.set_samples(start, F.embedding(tokens_NT[start : start + 1], table_VH))


def run_dense_part(
    skeleton: Skeleton,
    layer: DecoderLayer,
    stream: Stream,
    batch_samples: int,
    observers: Mapping[str, Observer] | None = None,
) -> Routing | None:
    """Runs a layer without its routed experts' contributions.

    Args:
        skeleton: the network.
        layer: the layer.
        stream: its weights, the layer's inputs, and where its outputs go.
        batch_samples: samples that pass together.
        observers: module name -> what gets every input of that module, [rows, features], in the order of samples.

    Returns:
        The routing of all tokens; None where the layer has no experts.
    """
    indices: list[torch.Tensor] = []
    shares: list[torch.Tensor] = []

    def note(expert_TK: torch.Tensor, share_TK: torch.Tensor) -> None:
        indices.append(expert_TK.to(torch.int16).cpu())
        shares.append(share_TK.float().cpu())

    num_samples, num_tokens, _ = stream.inputs.shape
    with _loaded(skeleton, layer.prefix, stream.weights) as module, ExitStack() as stack:
        for name, observer in (observers or {}).items():
            stack.enter_context(_observed(skeleton.module(name), observer))
        if layer.router is not None:
            tap = skeleton.module(f"{layer.prefix}.mlp.experts")
            assert isinstance(tap, RoutingTap)
            tap.sink = note
        position_ids = torch.arange(num_tokens).unsqueeze(0)
        for start in range(0, num_samples, batch_samples):
            hidden_NTH = stream.inputs.samples(start, min(start + batch_samples, num_samples))
            positions = skeleton.model.model.rotary_emb(hidden_NTH, position_ids)
            with torch.no_grad():
                output = module(hidden_NTH, position_embeddings=positions, position_ids=position_ids)
            stream.outputs.set_samples(start, output)
    return Routing(torch.cat(indices), torch.cat(shares)) if indices else None


@contextmanager
def _observed(module: nn.Module, observer: Observer) -> Iterator[None]:
    def watch(_: nn.Module, arguments: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        hidden = arguments[0] if arguments else named["hidden_states"]
        observer(hidden.detach().flatten(0, -2))

    handle = module.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def mlp_hidden(skeleton: Skeleton, weights: Weights, mlp: Mlp, inputs_RH: torch.Tensor) -> torch.Tensor:
    """The input of a gated MLP's down projection: act(gate(x)) * up(x).

    Args:
        skeleton: the network.
        weights: its weights.
        mlp: the MLP.
        inputs_RH: float32 [R, H].

    Returns:
        float32 [R, intermediate size].
    """
    gated = skeleton.activation(F.linear(inputs_RH, weights[f"{mlp.gate}.weight"]))
    return gated.mul_(F.linear(inputs_RH, weights[f"{mlp.up}.weight"]))


def run_mlp(skeleton: Skeleton, weights: Weights, mlp: Mlp, inputs_RH: torch.Tensor) -> torch.Tensor:
    """Runs one gated MLP: float32 [R, H] to [R, H]."""
    return F.linear(mlp_hidden(skeleton, weights, mlp, inputs_RH), weights[f"{mlp.down}.weight"])


def add_experts(
    skeleton: Skeleton,
    layer: DecoderLayer,
    streams: Sequence[tuple[Stream, Activations, Routing]],
    after_expert: Callable[[], None] = lambda: None,
) -> None:
    """Adds the routed experts' contributions to the outputs, expert by expert in ascending order.

    Args:
        skeleton: the network.
        layer: a layer with experts.
        streams: for each stream the experts' inputs [N, T, H] and the routing. Streams advance together, so those
            that share a cached base read each expert once.
        after_expert: called after every expert; it may raise to stop.
    """
    for mlp in layer.experts:
        assert mlp.expert is not None
        for stream, mlp_inputs, routing in streams:
            rows_R, share_R = routing.tokens_of(mlp.expert)
            if len(rows_R):
                contribution = run_mlp(skeleton, stream.weights, mlp, mlp_inputs.rows(rows_R))
                stream.outputs.add_rows(rows_R, contribution.mul_(share_R.unsqueeze(1)))
        after_expert()


def final_norm(skeleton: Skeleton, weights: Weights, hidden_NTH: torch.Tensor) -> torch.Tensor:
    """The decoder's last norm, [N, T, H] to the same shape."""
    with _loaded(skeleton, "model.norm", weights) as module, torch.no_grad():
        return module(hidden_NTH)  # type: ignore[no-any-return]


def logits(skeleton: Skeleton, weights: Weights, hidden_RH: torch.Tensor) -> torch.Tensor:
    """Scores of the next token.

    Args:
        skeleton: the network.
        weights: its weights.
        hidden_RH: float32 [R, H] after the last norm.

    Returns:
        float32 [R, vocabulary].
    """
    tied = skeleton.config.get("tie_word_embeddings")
    return F.linear(hidden_RH, weights["model.embed_tokens.weight" if tied else "lm_head.weight"])
