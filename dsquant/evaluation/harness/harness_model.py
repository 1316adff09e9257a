"""A model in memory as lm-evaluation-harness asks it. Imports the harness.

Texts become tokens as in the harness' own adapter of transformers' models: special tokens as the tokenizer puts them,
no chat template, what is longer than the context cut off on the left. Decoding is greedy.

Shape legend: B sequences of a batch, T tokens, H hidden size, P predicted tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dsquant.calibration.tokenizer import encode
from dsquant.evaluation.code.generation import continuations

# Tokens that pass the network together, and sequences that are continued together.
TOKENS_AT_ONCE = 4096
SEQUENCES_AT_ONCE = 24
# Predictions whose logits over the whole vocabulary are in memory together.
PREDICTIONS_AT_ONCE = 256
# What the harness' own adapters generate where a task does not say.
DEFAULT_MAX_TOKENS = 256

Asked = tuple[Any, list[int], list[int]]
"""What it is called (unused), the context's tokens, the continuation's."""


def generation_limits(asked: dict[str, Any]) -> tuple[tuple[str, ...], int, bool]:
    """Returns stop strings, the most tokens, and whether a task asks for sampling."""
    found = normalize_gen_kwargs(asked, DEFAULT_MAX_TOKENS)
    stops = found["until"] if isinstance(found["until"], list) else [found["until"]]
    return tuple(stop for stop in stops if stop), int(found["max_gen_toks"]), bool(found["do_sample"])


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Answers the harness' requests with a network whose weights are in memory."""

    def __init__(self, network: Any, tokenizer: Any, context: int, note: Callable[[int], None]) -> None:
        """Takes the network, its tokenizer and context, and what is called between batches, and between the tokens of
        a completion, with the number of requests that were answered since; it may raise to stop."""
        super().__init__()
        self._network, self.tokenizer, self.max_length, self._note = network, tokenizer, context, note

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns a text's tokens, with special ones where the text does not begin with them already."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return encode(string, self.tokenizer, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation after its context, and whether it is the greedy one."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Returns the log-likelihood of whole texts, in windows as long as the context."""
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            asked = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._scored(asked, lambda answered: self._note(0))))
            self._note(1)
        return found

    def _loglikelihood_tokens(self, requests: list[Asked], **_: Any) -> list[tuple[float, bool]]:
        return self._scored(requests, self._note)

    def _scored(self, requests: list[Asked], note: Callable[[int], None]) -> list[tuple[float, bool]]:
        """Scores continuations. Requests that read the same tokens, as the letters of a choice do, share a sequence."""
        sharing: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            read = (*context, *continuation)[-(self.max_length + 1) :][:-1]
            sharing.setdefault(read, []).append(number)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for batch in _batches(list(sharing)):
            answered = [(row, number) for row, read in enumerate(batch) for number in sharing[read]]
            targets = [requests[number][2][-len(batch[row]) :] for row, number in answered]
            scores = self._predictions(batch, [row for row, _ in answered], targets)
            for (_, number), (logs_P, greedy_P) in zip(answered, scores, strict=True):
                found[number] = (float(logs_P.sum()), bool(greedy_P.all()))
            note(len(answered))
        return found

    def _predictions(
        self, batch: Sequence[Sequence[int]], rows: Sequence[int], targets: Sequence[Sequence[int]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields for each list of target tokens, which end the sequence in its row, their log-probabilities [P] and
        whether each is the most likely token."""
        width = max(map(len, batch))
        # Padding follows a sequence, whose tokens do not see it.
        tokens_BT = torch.tensor([[*read, *[0] * (width - len(read))] for read in batch])
        tokens_BT = tokens_BT.to(self._network.device)
        hidden_BTH = self._network.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        places = [
            (row, len(batch[row]) - len(tokens) + at)
            for row, tokens in zip(rows, targets, strict=True)
            for at in range(len(tokens))
        ]
        row_P, at_P = (torch.tensor(values, device=hidden_BTH.device) for values in zip(*places, strict=True))
        target_P = torch.tensor([token for tokens in targets for token in tokens], device=hidden_BTH.device)
        logs, greedy = [], []
        for part in range(0, len(places), PREDICTIONS_AT_ONCE):
            chosen = slice(part, part + PREDICTIONS_AT_ONCE)
            logits_PV = self._network.lm_head(hidden_BTH[row_P[chosen], at_P[chosen]])
            logs.append(torch.log_softmax(logits_PV, -1).gather(1, target_P[chosen, None]).squeeze(1))
            greedy.append(logits_PV.argmax(-1) == target_P[chosen])
        lengths = [len(tokens) for tokens in targets]
        yield from zip(torch.cat(logs).split(lengths), torch.cat(greedy).split(lengths), strict=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Continues contexts greedily up to a stop string, which is not part of the answer."""
        alike: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for number, request in enumerate(requests):
            stops, most, _ = generation_limits(request.args[1])
            alike.setdefault((stops, most), []).append(number)
        found = [""] * len(requests)
        for (stops, most), numbers in alike.items():
            contexts = {number: self.tok_encode(requests[number].args[0]) for number in numbers}
            reading: dict[tuple[int, ...], list[int]] = {}
            for number, tokens in contexts.items():
                reading.setdefault(tuple(tokens[-(self.max_length - most) :]), []).append(number)
            ends = (*stops, self.tokenizer.eos_token) if self.tokenizer.eos_token else stops
            for batch in _batches(list(reading)):
                written = continuations(
                    self._network, self.tokenizer, batch, [ends] * len(batch), most, lambda tokens: self._note(0)
                )
                for read, completion in zip(batch, written, strict=True):
                    for number in reading[read]:
                        found[number] = completion.text
                self._note(sum(len(reading[read]) for read in batch))
        return found


def _batches(sequences: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Yields sequences of like length together, the longest first: what does not fit in memory ends at once."""
    batch: list[tuple[int, ...]] = []
    for sequence in sorted(sequences, key=lambda one: (-len(one), one)):
        if batch and (len(batch) == SEQUENCES_AT_ONCE or (len(batch) + 1) * len(batch[0]) > TOKENS_AT_ONCE):
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch
