"""Scores each token's prediction: loss, KL divergence in both directions, agreement of candidates with the original.

Logits are reduced part by part of the vocabulary, so that neither a model's head nor the logits of all tokens over the
whole vocabulary need to fit in memory.

Shape legend: N samples, T tokens of a sample, H hidden size, R rows (tokens, one after another), V tokens of the
vocabulary, K most likely tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch

from dsquant.jobs.ranks import ALONE, Ranks
from dsquant.kernels.products import apply_linear
from dsquant.kernels.threads import side_by_side
from dsquant.model.activations import Activations
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import (
    Stream,
    add_experts,
    embed,
    final_norm,
    head_name,
    num_parts,
    run_dense_part,
    table_parts,
)
from dsquant.source.weights import Weights

# Rows whose scores over a part of the vocabulary are in memory together.
ROWS_AT_ONCE = 512
# Of these, the rows that a thread takes, and the scores that it works on at a time, as many as a core's cache holds.
ROWS_OF_A_THREAD = 64
SCORES_AT_ONCE = 2**16
LIKELIEST = 5

SafePoint = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and what comes next; it may raise to stop."""


def num_steps(skeleton: Skeleton) -> int:
    """Returns the steps of a comparison: decoder layers, then parts of the vocabulary."""
    return skeleton.num_layers + num_parts(skeleton.config["vocab_size"])


def scoring(skeleton: Skeleton, part: int) -> tuple[int, int, str]:
    """Returns what a safe point is told before a part of the vocabulary is scored."""
    parts = num_parts(skeleton.config["vocab_size"])
    return skeleton.num_layers + part, num_steps(skeleton), f"vocabulary, part {part + 1} of {parts}"


@dataclass(frozen=True)
class ComparedModels:
    """An original and candidates, which run through the original's network together."""

    skeleton: Skeleton
    original: Weights
    candidates: Mapping[str, Weights]
    """Name -> weights, with the original's parameter names and on its device; of any format."""
    batch_samples: int = 1
    """Samples that pass attention together."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of each predicted token; the last token of each sample predicts nothing and is left out."""

    nll_original_NT: torch.Tensor
    """float64 [N, T - 1]: negative log-likelihood of the actual token under the original, in nats."""
    nll_candidate_NT: torch.Tensor
    """The same under the candidate."""
    kl_NT: torch.Tensor
    """float64 [N, T - 1]: KL(original || candidate) of the next token's distribution, in nats."""
    kl_reverse_NT: torch.Tensor
    """float64 [N, T - 1]: KL(candidate || original)."""
    same_top_NT: torch.Tensor
    """bool [N, T - 1]: whether both rank the same token first."""
    top5_overlap_NT: torch.Tensor
    """float64 [N, T - 1]: share of the original's five most likely tokens among the candidate's five."""

    def of_samples(self, start: int, stop: int) -> "TokenScores":
        """Returns the scores of samples start..stop-1."""
        return TokenScores(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    def summary(self) -> "Divergence":
        """Returns the means."""
        return Divergence(
            tokens=self.kl_NT.numel(),
            perplexity_original=float(self.nll_original_NT.mean().exp()),
            perplexity=float(self.nll_candidate_NT.mean().exp()),
            mean_kl=float(self.kl_NT.mean()),
            top1_agreement=float(self.same_top_NT.double().mean()),
        )


@dataclass(frozen=True)
class Divergence:
    """Distance of a candidate from the original on one text: a row of the table at the end of a job."""

    tokens: int
    """Predicted tokens."""
    perplexity_original: float
    perplexity: float
    mean_kl: float
    """Nats per token."""
    top1_agreement: float
    """Share of tokens, 0 to 1."""


class _Sums:
    """Running sums over the vocabulary of one model's scores, for every row."""

    def __init__(self, targets_R: torch.Tensor, others: int) -> None:
        """Begins the sums; the scores are compared with those of `others` models."""
        num_rows, device = len(targets_R), targets_R.device
        self._targets_R = targets_R
        self.maximum_R = torch.full((num_rows,), -torch.inf, dtype=torch.float64, device=device)
        self.exponentials_R = torch.zeros_like(self.maximum_R)
        self.target_R = torch.zeros_like(self.maximum_R)
        self.top_RK = torch.full((num_rows, LIKELIEST), -1, device=device)
        self.top_scores_RK = self.maximum_R.unsqueeze(1).repeat(1, LIKELIEST)
        # of each other model: sum of exp(own score) * (own score - its score), shrunk along with the exponentials
        self.crosses_R = [torch.zeros_like(self.maximum_R) for _ in range(others)]

    def add(self, rows: slice, start: int, scores_RV: torch.Tensor, differences: Sequence[torch.Tensor]) -> None:
        """Adds a part of the vocabulary, which begins at token `start`: float64 [R, V], and less each other model's."""
        before_R, targets_R = self.maximum_R[rows], self._targets_R[rows]
        maximum_R = torch.maximum(scores_RV.amax(1), before_R)
        shrink_R = torch.exp(before_R - maximum_R)
        weight_RV = (scores_RV - maximum_R.unsqueeze(1)).exp_()
        self.exponentials_R[rows] = self.exponentials_R[rows] * shrink_R + weight_RV.sum(1)
        for cross_R, difference_RV in zip(self.crosses_R, differences, strict=True):
            cross_R[rows] = cross_R[rows] * shrink_R + (weight_RV * difference_RV).sum(1)
        self.maximum_R[rows] = maximum_R
        inside_R = (targets_R >= start) & (targets_R < start + scores_RV.shape[1])
        picked_R = scores_RV.gather(1, (targets_R - start).clamp(0, scores_RV.shape[1] - 1).unsqueeze(1)).squeeze(1)
        self.target_R[rows] = torch.where(inside_R, picked_R, self.target_R[rows])
        self._rank(rows, start, scores_RV)

    def _rank(self, rows: slice, start: int, scores_RV: torch.Tensor) -> None:
        best_RK, places_RK = scores_RV.topk(min(LIKELIEST, scores_RV.shape[1]))
        scores = torch.cat([self.top_scores_RK[rows], best_RK], 1)
        tokens = torch.cat([self.top_RK[rows], places_RK + start], 1)
        self.top_scores_RK[rows], kept_RK = scores.topk(LIKELIEST)
        self.top_RK[rows] = tokens.gather(1, kept_RK)

    @property
    def log_sum_R(self) -> torch.Tensor:
        """log of the sum of exponentials of all scores."""
        return self.maximum_R + self.exponentials_R.log()


@dataclass(frozen=True)
class Head:
    """A model's output table and the normed hidden states that it scores."""

    weights: Weights
    name: str
    """Name of the table's tensor."""
    hidden: Activations
    """[.., .., H], R rows in all."""

    def scores(self, rows_R: torch.Tensor, table_VH: torch.Tensor) -> torch.Tensor:
        """Returns the logits of some rows over a part of the table, float32 [R, V]."""
        rounding = self.weights.activation_quantizer(self.name)
        return apply_linear(rounding(self.hidden.rows(rows_R)), table_VH)


@dataclass(frozen=True)
class RowScores:
    """The fields of `TokenScores`, row by row: float64 [R]."""

    nll_original_R: torch.Tensor
    nll_candidate_R: torch.Tensor
    kl_R: torch.Tensor
    kl_reverse_R: torch.Tensor
    same_top_R: torch.Tensor
    top5_overlap_R: torch.Tensor

    def tokens(self, shape: tuple[int, int]) -> TokenScores:
        """Returns the first rows as samples of tokens, without each sample's last, which predicts nothing."""
        num_rows = shape[0] * shape[1]
        return TokenScores(*(getattr(self, field.name)[:num_rows].view(shape)[:, :-1].cpu() for field in fields(self)))


def score(
    original: Head,
    candidates: Sequence[Head],
    targets_R: torch.Tensor,
    observer: Callable[[int, Sequence[torch.Tensor]], None] = lambda part, tables: None,
    ranks: Ranks = ALONE,
) -> list[RowScores]:
    """Scores rows of hidden states against their next tokens (int64 [R]), with each part of each head read once.

    All heads have the same rows, of which ranks score their shares. `observer` gets the number of each part, and the
    part of each table, float32 [V, H], the original's first.
    """
    num_rows = len(targets_R)
    sums = [_Sums(targets_R, len(candidates)), *(_Sums(targets_R, 1) for _ in candidates)]
    for part, (start, tables) in enumerate(_tables((original, *candidates))):
        observer(part, tables)
        for first in range(0, num_rows, ROWS_AT_ONCE)[ranks.rank :: ranks.size]:
            numbers_R = torch.arange(first, min(first + ROWS_AT_ONCE, num_rows))
            heads = zip((original, *candidates), tables, strict=True)
            _add(sums, first, start, [head.scores(numbers_R, table_VH) for head, table_VH in heads])
    return [_of_all_ranks(_row_scores(sums[0], place, one), ranks) for place, one in enumerate(sums[1:])]


def _of_all_ranks(own: RowScores, ranks: Ranks) -> RowScores:
    """The scores of all rows, on every rank: those of each `ROWS_AT_ONCE` from the rank that has made them."""
    if ranks.size == 1:
        return own
    parts = ranks.gather([getattr(own, field.name).cpu() for field in fields(own)])
    rows_R = torch.arange(len(parts[0][0]))
    made_by_R = rows_R // ROWS_AT_ONCE % ranks.size
    device = own.kl_R.device
    return RowScores(*(torch.stack(columns)[made_by_R, rows_R].to(device) for columns in zip(*parts, strict=True)))


def _add(sums: Sequence[_Sums], first: int, start: int, scores: Sequence[torch.Tensor]) -> None:
    """Adds a part of the vocabulary of every model, float32 [R, V], to the sums of rows from `first` on."""
    num_rows, width = scores[0].shape
    of_thread, at_once = ROWS_OF_A_THREAD, max(1, SCORES_AT_ONCE // width)
    if scores[0].is_cuda:
        of_thread = at_once = num_rows

    def add(row: int) -> None:
        for begin in range(row, min(row + of_thread, num_rows), at_once):
            end = min(begin + at_once, row + of_thread, num_rows)
            own_RV, *others = (one[begin:end].double() for one in scores)
            differences = [own_RV - other_RV for other_RV in others]
            rows = slice(first + begin, first + end)
            sums[0].add(rows, start, own_RV, differences)
            for one, other_RV, difference_RV in zip(sums[1:], others, differences, strict=True):
                one.add(rows, start, other_RV, [difference_RV.neg_()])

    side_by_side(add, range(0, num_rows, of_thread))


def _tables(heads: Sequence[Head]) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yields the parts of all heads' tables with their first row; heads with the same weights share one read."""
    models = {id(head.weights): table_parts(head.weights, head.name) for head in heads}
    for parts in zip(*models.values(), strict=True):
        read = dict(zip(models, (table_VH for _, table_VH in parts), strict=True))
        yield parts[0][0], [read[id(head.weights)] for head in heads]


def _row_scores(original: _Sums, place: int, candidate: _Sums) -> RowScores:
    """Returns the scores of the candidate at a place among those that the original was compared with."""
    difference_R = original.log_sum_R - candidate.log_sum_R
    same_RKK = original.top_RK.unsqueeze(2) == candidate.top_RK.unsqueeze(1)
    return RowScores(
        nll_original_R=original.log_sum_R - original.target_R,
        nll_candidate_R=candidate.log_sum_R - candidate.target_R,
        kl_R=(original.crosses_R[place] / original.exponentials_R - difference_R).clamp(min=0),
        kl_reverse_R=(candidate.crosses_R[0] / candidate.exponentials_R + difference_R).clamp(min=0),
        same_top_R=original.top_RK[:, 0] == candidate.top_RK[:, 0],
        top5_overlap_R=same_RKK.any(2).double().mean(1),
    )


def compare(
    models: ComparedModels,
    tokens_NT: torch.Tensor,
    work: Path | None,
    safe_point: SafePoint = lambda done, total, what: None,
) -> dict[str, TokenScores]:
    """Runs all models on the same tokens (int64 [N, T]) and scores each candidate's predictions.

    `work` is a folder for hidden states: 12 * N * T * H bytes for each model; with None they are in memory, on the
    models' device. `safe_point` is called before each layer, expert and part of the vocabulary.
    """
    skeleton, device = models.skeleton, models.original.device
    shape = (tokens_NT.shape[0], tokens_NT.shape[1], skeleton.config["hidden_size"])
    heads = []
    try:
        lanes = []
        for number, weights in enumerate((models.original, *models.candidates.values())):
            paths = [None if work is None else work / f"evaluate-{number}-{part}.f32" for part in range(3)]
            even, odd, mlp_inputs = (Activations.passing(path, shape, device) for path in paths)
            lanes.append((weights, even, odd, mlp_inputs))
            embed(skeleton, weights, tokens_NT, even)
        _run_layers(models, lanes, safe_point)
        for weights, even, odd, normed in lanes:
            last = odd if skeleton.num_layers % 2 else even
            for sample in range(last.shape[0]):
                normed.set_samples(sample, final_norm(skeleton, weights, last.samples(sample, sample + 1)))
            heads.append(Head(weights, head_name(skeleton), normed))
        targets_R = torch.roll(tokens_NT.flatten(), -1).to(device)
        scores = score(heads[0], heads[1:], targets_R, lambda part, _: safe_point(*scoring(skeleton, part)))
        return {name: rows.tokens(shape[:2]) for name, rows in zip(models.candidates, scores, strict=True)}
    finally:
        for path in work.glob("evaluate-*.f32") if work is not None else ():
            path.unlink()


def _run_layers(
    models: ComparedModels,
    lanes: Sequence[tuple[Weights, Activations, Activations, Activations]],
    safe_point: SafePoint,
) -> None:
    skeleton, total = models.skeleton, num_steps(models.skeleton)
    for layer in skeleton.layers[: skeleton.num_layers]:
        swap = layer.index % 2
        runs = []
        for name, (weights, even, odd, mlp_inputs) in zip(("the original", *models.candidates), lanes, strict=True):
            safe_point(layer.index, total, f"{layer.prefix} of {name}")
            stream = Stream(weights, odd, even) if swap else Stream(weights, even, odd)
            observers = {layer.mlp_module: mlp_inputs.recorder()}
            routing = run_dense_part(skeleton, layer, stream, models.batch_samples, observers)
            if routing is not None:
                runs.append((stream, mlp_inputs, routing))
        if runs:
            add_experts(skeleton, layer, runs, partial(safe_point, layer.index, total, layer.prefix))
