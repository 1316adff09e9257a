"""Completes prompts with a model whose weights come from a lazy mapping.

The network, its cache and `generate` are transformers' own. The weights of everything but the routed experts are loaded
into the modules while completions are generated; experts run one after the other, each with the tokens that chose it.
Both need memory for the whole model in float32: a larger one generates nothing (`resident_size`).

Shape legend: N prompts, T tokens, R tokens of all samples, H hidden size, K experts of a token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsquant.calibration.tokenizer import decode, encode
from dsquant.evaluation.code.tasks import DriftPlan
from dsquant.model.engine import rounded_head, rounded_linears
from dsquant.model.gated import GatedWeights
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import head_name
from dsquant.model.structure import DecoderLayer
from dsquant.source.weights import Weights

BYTES_OF_FLOAT32 = 4


@dataclass(frozen=True)
class Completion:
    """A model's completion of one prompt."""

    text: str
    """Without the part that a stop rule cut off."""
    tokens: tuple[int, ...]
    """The model's tokens, including a final end of text or stop string."""
    truncated: bool
    """Whether it reached the largest number of tokens before a stop rule applied."""


def resident_size(skeleton: Skeleton) -> int:
    """Returns the bytes that generation needs for weights: the decoder in float32, without MTP layers."""
    beyond = tuple(f"{layer.prefix}." for layer in skeleton.layers[skeleton.num_layers :])
    shapes = [shape for name, shape in skeleton.expected_shapes().items() if not name.startswith(beyond or "\n")]
    return BYTES_OF_FLOAT32 * sum(torch.Size(shape).numel() for shape in shapes)


class _Experts(nn.Module):
    """A layer's routed experts, run one by one."""

    def __init__(self, skeleton: Skeleton, layer: DecoderLayer, weights: Weights) -> None:
        super().__init__()
        self._skeleton = (skeleton,)  # in a tuple, or its modules would become this module's
        self._experts = [GatedWeights.read(weights, mlp) for mlp in layer.experts]

    def forward(self, hidden_RH: torch.Tensor, expert_RK: torch.Tensor, share_RK: torch.Tensor) -> torch.Tensor:
        """Returns the mixture's output [R, H]."""
        output_RH = torch.zeros_like(hidden_RH)
        for expert in expert_RK.unique().tolist():
            rows_R, places_R = torch.where(expert_RK == expert)
            contribution = self._experts[expert].output(self._skeleton[0], hidden_RH[rows_R])
            output_RH[rows_R] += contribution * share_RK[rows_R, places_R].unsqueeze(1).to(contribution.dtype)
        return output_RH


@contextmanager
def resident_model(skeleton: Skeleton, weights: Weights) -> Iterator[Any]:
    """Loads weights into the network's modules and yields transformers' model, ready for `generate`; unloads them
    afterwards.

    Multi-token-prediction layers are left out for that time.
    """
    from accelerate.utils import set_module_tensor_to_device

    model = skeleton.model
    all_layers = model.model.layers
    taps = {
        layer: skeleton.module(layer.experts_module)
        for layer in skeleton.layers[: skeleton.num_layers]
        if layer.router is not None
    }
    model.model.layers = all_layers[: skeleton.num_layers]
    before: dict[str, torch.Tensor] = {}
    try:
        for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            if name in weights or tensor.is_meta:
                stored = name if name in weights else head_name(skeleton)
                set_module_tensor_to_device(model, name, weights.device, value=weights[stored])
                before[name] = tensor
        for layer in taps:
            model.set_submodule(layer.experts_module, _Experts(skeleton, layer, weights))
        with ExitStack() as stack:
            for layer in skeleton.layers[: skeleton.num_layers]:
                stack.enter_context(rounded_linears(skeleton, layer, weights))
            stack.enter_context(rounded_head(skeleton, head_name(skeleton), weights))
            yield model
    finally:
        for layer, tap in taps.items():
            model.set_submodule(layer.experts_module, tap)
        for name, tensor in before.items():
            set_module_tensor_to_device(model, name, tensor.device, value=tensor)
        model.model.layers = all_layers


def complete(
    skeleton: Skeleton,
    weights: Weights,
    tokenizer: Any,
    plan: DriftPlan,
    safe_point: Callable[[int, int], None] = lambda done, total: None,
) -> list[Completion]:
    """Completes the plan's prompts greedily: the most likely token each time.

    `safe_point` is called before each token of a batch with tokens done and tokens in all; it may raise to stop.
    """
    prompts, stops = [task.prompt for task in plan.tasks], [task.stops for task in plan.tasks]
    max_tokens, batch_prompts = plan.max_tokens, plan.batch_prompts
    encoded = [encode(prompt, tokenizer) for prompt in prompts]
    # Prompts of like length together: less padding.
    order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    batches = [order[start : start + batch_prompts] for start in range(0, len(order), batch_prompts)]
    found: dict[int, Completion] = {}
    with resident_model(skeleton, weights) as model, torch.no_grad():
        for number, batch in enumerate(batches):
            before, in_all = number * max_tokens, len(batches) * max_tokens

            def note(done: int, before: int = before, in_all: int = in_all) -> None:
                safe_point(before + done, in_all)

            told = [encoded[one] for one in batch], [stops[one] for one in batch]
            found |= zip(batch, continuations(model, tokenizer, *told, max_tokens, note), strict=True)
    return [found[number] for number in range(len(prompts))]


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[Sequence[str]],
    max_tokens: int,
    note: Callable[[int], None],
) -> list[Completion]:
    """Continues a batch of prompts (token ids) greedily, each up to the end of text or one of its stop strings.

    `model` is what `resident_model` yields; `note` is called before each token with the number of tokens done.
    """
    rule = _StopRule(tokenizer, stops)
    rows = _generate(model, prompts, max_tokens, rule, note)
    return [rule.completion(row, tokens) for row, tokens in enumerate(rows)]


def _generate(
    model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, rule: "_StopRule", note: Callable[[int], None]
) -> list[list[int]]:
    """Returns the new tokens of each prompt of a batch; those that ended early are padded."""
    width = max(len(prompt) for prompt in prompts)
    padding = padding_token(rule.tokenizer, model.get_input_embeddings().num_embeddings)
    tokens_NT = torch.tensor([[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask_NT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def stopped(tokens_NT: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        note(tokens_NT.shape[1] - width)
        ended = [rule(row, tokens) for row, tokens in enumerate(tokens_NT[:, width:].tolist())]
        return torch.tensor(ended, device=tokens_NT.device)

    output_NT = model.generate(
        tokens_NT.to(model.device),
        attention_mask=mask_NT.to(model.device),
        use_cache=True,
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=rule.tokenizer.eos_token_id,
        pad_token_id=padding,
        stopping_criteria=[stopped],
    )
    return output_NT[:, width:].tolist()


def padding_token(tokenizer: Any, rows: int) -> int:
    """Returns any token that has a row in the embedding: it is masked before the prompt, and cut off after the end."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None and token < rows)


class _StopRule:
    """Ends a completion at the end of text or after a stop string, which may be the name of a special token."""

    def __init__(self, tokenizer: Any, stops: Sequence[Sequence[str]]) -> None:
        self.tokenizer = tokenizer
        self._stops = stops
        added = tokenizer.get_added_vocab()
        self._ends = [{tokenizer.eos_token_id, *(added[stop] for stop in row if stop in added)} for row in stops]

    def text(self, tokens: Sequence[int]) -> str:
        return decode(tokens, self.tokenizer)

    def __call__(self, row: int, tokens: Sequence[int]) -> bool:
        return tokens[-1] in self._ends[row] or self._cut(row, self.text(tokens)) is not None

    def _cut(self, row: int, text: str) -> int | None:
        """Returns where the first stop string begins."""
        places = [text.find(stop) for stop in self._stops[row]]
        return min((place for place in places if place >= 0), default=None)

    def completion(self, row: int, tokens: Sequence[int]) -> Completion:
        """Returns the completion that a row of new tokens holds."""
        length = next((end for end in range(1, len(tokens) + 1) if self(row, tokens[:end])), len(tokens))
        kept, text = tuple(tokens[:length]), self.text(tokens[:length])
        ended = bool(kept) and self(row, kept)
        return Completion(text[: self._cut(row, text)], kept, truncated=not ended)
