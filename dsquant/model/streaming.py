"""Runs decoder layers whose weights lie on disk, for many samples, one expert in memory at a time.

A layer is attention, norms, router, the shared expert or dense MLP (all of it transformers' forward, its weights put
in by accelerate) plus the sum of the routed experts' contributions. So it runs in two sweeps: `run_dense_part`
over batches of samples, which also notes every token's experts, and `add_experts` over experts, each fetched once for
all its tokens.

Shape legend: N samples, T tokens of a sample, H hidden size, R tokens of all samples, K experts of a token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from dsquant.kernels.products import apply_linear
from dsquant.model.activations import Activations
from dsquant.model.engine import rounded_linears
from dsquant.model.gated import GatedWeights
from dsquant.model.skeleton import RoutingTap, Skeleton
from dsquant.model.structure import DecoderLayer
from dsquant.source.weights import Weights

EMBEDDING = "model.embed_tokens.weight"
ROWS_AT_ONCE = 4096
VOCABULARY_AT_ONCE = 8192
# Of a module's weights, those that are being read while one is put in: R1's largest have 130 MB in FP8.
WEIGHTS_AHEAD = 4
# Tokens that pass attention together. Fixed, since the order of sums, and with it the output's bytes, depends on it.
BATCH_TOKENS = 1024

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
        """Returns an expert's tokens: their rows int64 [n] in ascending order, and its share in each, float32 [n]."""
        rows, shares, ends = self._by_expert
        if not 0 <= expert < len(ends):
            return rows[:0], shares[:0]
        own = slice(ends[expert - 1] if expert else 0, ends[expert])
        return rows[own], shares[own]

    @cached_property
    def _by_expert(self) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Rows and shares of all tokens, expert by expert, and where each expert's end: a GPU is asked once."""
        experts, order = self.expert_RK.flatten().sort(stable=True)
        ends = torch.bincount(experts.long()).cumsum(0).tolist()
        return order // self.expert_RK.shape[1], self.share_RK.flatten()[order], ends

    def counts(self, num_experts: int) -> torch.Tensor:
        """Tokens of each expert, int64 [E]."""
        return torch.bincount(self.expert_RK.flatten().long(), minlength=num_experts)


@dataclass(frozen=True)
class Stream:
    """One version of the weights with the hidden states that pass through it."""

    weights: Weights
    inputs: Activations
    outputs: Activations


@contextmanager
def loaded(skeleton: Skeleton, name: str, weights: Weights) -> Iterator[nn.Module]:
    """Puts the weights into a module, and takes them out again afterwards."""
    from accelerate.utils import set_module_tensor_to_device

    module = skeleton.module(name)
    inside = [*dict(module.named_parameters()), *dict(module.named_buffers())]
    try:
        for place, part in enumerate(inside):
            weights.prefetch([f"{name}.{later}" for later in inside[place : place + WEIGHTS_AHEAD]])
            value = weights[f"{name}.{part}"]
            # emptying CUDA's cache for each parameter would have a GPU finish, and its memory allocated again
            set_module_tensor_to_device(module, part, weights.device, value=value, clear_cache=False)
        yield module
    finally:
        for part in inside:
            set_module_tensor_to_device(module, part, "meta")


def embed(skeleton: Skeleton, weights: Weights, tokens_NT: torch.Tensor, outputs: Activations) -> None:
    """Stores the embeddings of all samples [N, T] in `outputs` [N, T, H]; the table passes through memory in parts."""
    tokens_R = tokens_NT.flatten().to(weights.device)
    for start, table_VH in table_parts(weights, EMBEDDING):
        rows_R = torch.where((tokens_R >= start) & (tokens_R < start + len(table_VH)))[0]
        for part_R in rows_R.split(ROWS_AT_ONCE):
            outputs.set_rows(part_R, table_VH[tokens_R[part_R] - start])


def num_parts(num_rows: int) -> int:
    """Returns in how many parts `table_parts` reads a table of so many rows."""
    return -(-num_rows // VOCABULARY_AT_ONCE)


def table_parts(weights: Weights, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """Reads a vocabulary-sized table in parts: yields a part's first row, and its rows float32 [<= 8192, H]."""
    num_rows = weights.shape(name)[0]
    for start in range(0, num_rows, VOCABULARY_AT_ONCE):
        yield start, weights.rows(name, start, min(start + VOCABULARY_AT_ONCE, num_rows))


def run_dense_part(
    skeleton: Skeleton,
    layer: DecoderLayer,
    stream: Stream,
    batch_samples: int,
    observers: Mapping[str, Observer] | None = None,
    samples: tuple[int, int] | None = None,
    after_batch: Callable[[int, torch.Tensor], None] = lambda stop, outputs: None,
) -> Routing | None:
    """Runs a layer without its routed experts' contributions; returns the routing, None where it has no experts.

    `batch_samples` pass together. Observers, by module name, get every input [rows, features] of that module in the
    order of samples. `samples` are the first and the one behind the last; None is all. `after_batch` is called after
    every batch with the number of the sample that comes next, and the batch's outputs [n, T, H].
    """
    indices: list[torch.Tensor] = []
    shares: list[torch.Tensor] = []

    def note(expert_TK: torch.Tensor, share_TK: torch.Tensor) -> None:
        indices.append(expert_TK.to(torch.int16))
        shares.append(share_TK.float())

    num_samples = stream.inputs.shape[0]
    with loaded(skeleton, layer.prefix, stream.weights) as module, ExitStack() as stack:
        stack.enter_context(rounded_linears(skeleton, layer, stream.weights))
        for name, observer in (observers or {}).items():
            stack.enter_context(_observed(skeleton.module(name), observer))
        if layer.router is not None:
            tap = skeleton.module(layer.experts_module)
            assert isinstance(tap, RoutingTap)
            tap.sink = note
        begin, end = samples or (0, num_samples)
        for start in range(begin, end, batch_samples):
            stop = min(start + batch_samples, end)
            hidden_NTH = stream.inputs.samples(start, stop)
            stream.inputs.prefetch(stop, min(stop + batch_samples, end))
            with torch.no_grad():
                output = layer_outputs(skeleton, module, hidden_NTH)
            stream.outputs.set_samples(start, output)
            after_batch(stop, output)
    return Routing(torch.cat(indices), torch.cat(shares)) if indices else None


def layer_outputs(skeleton: Skeleton, module: nn.Module, hidden_NTH: torch.Tensor) -> torch.Tensor:
    """Calls a decoder layer of transformers, whose weights are loaded, on whole samples [N, T, H]; returns the same
    shape."""
    skeleton.check_length(hidden_NTH.shape[1])
    position_ids = torch.arange(hidden_NTH.shape[1], device=hidden_NTH.device).unsqueeze(0)
    positions = skeleton.model.model.rotary_emb(hidden_NTH, position_ids)
    sparse: dict[str, torch.Tensor] = {}
    if skeleton.family.sparse is not None:  # they take a mask apart, and pass on what they have chosen
        sparse["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=hidden_NTH.device)
        sparse["prev_topk_indices"] = position_ids.new_empty(0)
    output = module(hidden_NTH, position_embeddings=positions, position_ids=position_ids, **sparse)
    return output[0] if isinstance(output, tuple) else output


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


def add_experts(
    skeleton: Skeleton,
    layer: DecoderLayer,
    streams: Sequence[tuple[Stream, Activations, Routing]],
    after_expert: Callable[[], None] = lambda: None,
) -> None:
    """Adds the routed experts' contributions to the outputs, expert by expert in ascending order.

    Each stream has its experts' inputs [N, T, H] and routing. Streams advance together, so those that share a cached
    base read each expert once. `after_expert` is called after every expert; it may raise to stop.
    """
    for mlp in layer.experts:
        assert mlp.expert is not None
        for stream, mlp_inputs, routing in streams:
            if (routing.expert_RK == mlp.expert).any():
                add_expert(skeleton, mlp.expert, GatedWeights.read(stream.weights, mlp), stream, mlp_inputs, routing)
        after_expert()


def add_expert(
    skeleton: Skeleton,
    expert: int,
    weights: GatedWeights,
    stream: Stream,
    mlp_inputs: Activations,
    routing: Routing,
    rows_at_once: int = ROWS_AT_ONCE,
) -> None:
    """Adds one expert's contributions to the outputs of the tokens that reach it, `rows_at_once` together."""
    for part_R, contribution_RH in contributions(skeleton, expert, weights, mlp_inputs, routing, rows_at_once):
        stream.outputs.add_rows(part_R, contribution_RH)


def contributions(
    skeleton: Skeleton,
    expert: int,
    weights: GatedWeights,
    mlp_inputs: Activations,
    routing: Routing,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields an expert's tokens, int64 [R] in ascending order, and what it adds to their outputs, float32 [R, H],
    `rows_at_once` together."""
    rows_R, share_R = routing.tokens_of(expert)
    for part_R, part_share_R in zip(rows_R.split(rows_at_once), share_R.split(rows_at_once), strict=True):
        yield part_R, weights.output(skeleton, mlp_inputs.rows(part_R)).mul_(part_share_R.unsqueeze(1))


def final_norm(skeleton: Skeleton, weights: Weights, hidden_NTH: torch.Tensor) -> torch.Tensor:
    """Applies the decoder's last norm, [N, T, H] to the same shape."""
    with loaded(skeleton, "model.norm", weights) as module, torch.no_grad():
        return module(hidden_NTH)


def head_name(skeleton: Skeleton) -> str:
    """Returns the name of the table that scores the next token."""
    return EMBEDDING if skeleton.config.get("tie_word_embeddings") else "lm_head.weight"


def mtp_inputs(
    skeleton: Skeleton, weights: Weights, layer: DecoderLayer, tokens_NT: torch.Tensor, stream: Stream
) -> None:
    """Prepares the inputs of a multi-token-prediction layer (DeepSeek-V3 report, arXiv 2412.19437, section 2.2).

    eh_proj([enorm(embedding of the next token); hnorm(the decoder's normed output)]). The last token of a sample has no
    successor here and takes its own. The stream's `inputs` hold the last decoder layer's outputs; `outputs` is written.
    """
    next_NT = torch.cat([tokens_NT[:, 1:], tokens_NT[:, -1:]], dim=1)
    embed(skeleton, weights, next_NT, stream.outputs)
    projection = weights[f"{layer.prefix}.eh_proj.weight"]
    norms = {name: weights[f"{layer.prefix}.{name}.weight"] for name in ("enorm", "hnorm")}
    for sample in range(len(tokens_NT)):
        hidden = final_norm(skeleton, weights, stream.inputs.samples(sample, sample + 1))
        embedded = stream.outputs.samples(sample, sample + 1)
        both = [_rms_norm(skeleton, embedded, norms["enorm"]), _rms_norm(skeleton, hidden, norms["hnorm"])]
        stream.outputs.set_samples(sample, apply_linear(torch.cat(both, dim=-1), projection))


def _rms_norm(skeleton: Skeleton, hidden: torch.Tensor, gain_H: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden, gain_H.shape, gain_H, skeleton.config["rms_norm_eps"])


def samples_together(seq_len: int) -> int:
    """Returns how many samples of so many tokens pass attention together."""
    return max(1, BATCH_TOKENS // seq_len)
