"""Perplexity, KL divergence and top-1 agreement of a candidate against the original, layer by layer.

Both models run in lockstep on the same tokens, so neither needs to fit in memory; the scores over the vocabulary are
summed up part by part, so neither do they.

Shape legend: N samples, T tokens of a sample, H hidden size, R tokens of all samples, V tokens of the vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dsquant.model.activations import Activations
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import (
    Stream,
    add_experts,
    embed,
    final_norm,
    head_name,
    run_dense_part,
    table_parts,
)
from dsquant.source.weights import Weights

# Tokens whose scores over a part of the vocabulary are in memory together.
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class TokenScores:
    """What each predicted token cost; the last token of each sample predicts nothing and is not in here."""

    nll_original_NT: torch.Tensor
    """float64 [N, T - 1]: negative log-likelihood of the token that came, in nats, under the original."""
    nll_candidate_NT: torch.Tensor
    """The same under the candidate."""
    kl_NT: torch.Tensor
    """float64 [N, T - 1]: KL(original || candidate) of the next token's distribution, in nats."""
    same_top_NT: torch.Tensor
    """bool [N, T - 1]: whether both rank the same token first."""

    def of_samples(self, start: int, stop: int) -> "TokenScores":
        """The scores of samples start..stop-1."""
        parts = (self.nll_original_NT, self.nll_candidate_NT, self.kl_NT, self.same_top_NT)
        return TokenScores(*(part[start:stop] for part in parts))

    def summary(self) -> "Divergence":
        """The means."""
        return Divergence(
            tokens=self.kl_NT.numel(),
            perplexity_original=math.exp(float(self.nll_original_NT.mean())),
            perplexity=math.exp(float(self.nll_candidate_NT.mean())),
            mean_kl=float(self.kl_NT.mean()),
            top1_agreement=float(self.same_top_NT.double().mean()),
        )


@dataclass(frozen=True)
class Divergence:
    """How far a candidate is from the original on one text."""

    tokens: int
    """Predicted tokens."""
    perplexity_original: float
    perplexity: float
    mean_kl: float
    """Nats per token."""
    top1_agreement: float
    """Share of tokens, 0 to 1."""


def compare(
    skeleton: Skeleton,
    original: Weights,
    candidates: Mapping[str, Weights],
    tokens_NT: torch.Tensor,
    work: Path,
    batch_samples: int,
    safe_point: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, TokenScores]:
    """Runs the original and candidates on the same tokens.

    Args:
        skeleton: the original's network, which the candidates share.
        original: its weights.
        candidates: name -> weights, with the original's parameter names.
        tokens_NT: int64 [N, T].
        work: a folder for hidden states, 4 * N * T * H bytes three times for each model.
        batch_samples: samples that pass attention together.
        safe_point: called before each layer and expert with layers done, layers in all and the module's name.

    Returns:
        Candidate name -> its scores.
    """
    shape = (tokens_NT.shape[0], tokens_NT.shape[1], skeleton.config["hidden_size"])
    models = {"": original, **candidates}
    streams = []
    try:
        for number, weights in enumerate(models.values()):
            even, odd, mlp_inputs = (
                Activations.in_file(work / f"evaluate-{number}-{part}.f32", shape) for part in range(3)
            )
            streams.append((weights, even, odd, mlp_inputs))
            embed(skeleton, weights, tokens_NT, even)
        finals = _run_layers(skeleton, streams, batch_samples, safe_point)
        safe_point(skeleton.num_layers, skeleton.num_layers, "lm_head")
        return _score(skeleton, models, finals, tokens_NT)
    finally:
        for path in work.glob("evaluate-*.f32"):
            path.unlink()


def _run_layers(
    skeleton: Skeleton,
    models: Sequence[tuple[Weights, Activations, Activations, Activations]],
    batch_samples: int,
    safe_point: Callable[[int, int, str], None],
) -> list[Activations]:
    """Every model's normed final hidden states."""
    for layer in skeleton.layers[: skeleton.num_layers]:
        swap = layer.index % 2
        runs = []
        for weights, even, odd, mlp_inputs in models:
            safe_point(layer.index, skeleton.num_layers, layer.prefix)
            stream = Stream(weights, odd, even) if swap else Stream(weights, even, odd)
            observers = {f"{layer.prefix}.mlp": mlp_inputs.recorder()}
            routing = run_dense_part(skeleton, layer, stream, batch_samples, observers)
            if routing is not None:
                runs.append((stream, mlp_inputs, routing))
        if runs:
            add_experts(skeleton, layer, runs, partial(safe_point, layer.index, skeleton.num_layers, layer.prefix))
    finals = []
    for weights, even, odd, normed in models:
        last = odd if skeleton.num_layers % 2 else even
        for sample in range(last.shape[0]):
            normed.set_samples(sample, final_norm(skeleton, weights, last.samples(sample, sample + 1)))
        finals.append(normed)
    return finals


class _Sums:
    """Running sums over the vocabulary of one model's scores, for every token."""

    def __init__(self, num_rows: int) -> None:
        self.maximum_R = torch.full((num_rows,), -torch.inf, dtype=torch.float64)
        self.exponentials_R = torch.zeros(num_rows, dtype=torch.float64)
        self.target_R = torch.zeros(num_rows, dtype=torch.float64)
        self.top_R = torch.zeros(num_rows, dtype=torch.int64)

    def add(self, rows: slice, start: int, scores_RV: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
        """Takes a part of the vocabulary in; returns the factor by which older sums shrink, float64 [rows]."""
        values_R, places_R = scores_RV.max(1)
        before_R = self.maximum_R[rows]
        higher_R = values_R > before_R
        self.top_R[rows] = torch.where(higher_R, places_R + start, self.top_R[rows])
        maximum_R = torch.where(higher_R, values_R, before_R)
        shrink_R = torch.exp(before_R - maximum_R)
        sums_R = torch.exp(scores_RV - maximum_R.unsqueeze(1)).sum(1)
        self.exponentials_R[rows] = self.exponentials_R[rows] * shrink_R + sums_R
        self.maximum_R[rows] = maximum_R
        inside_R = (targets_R >= start) & (targets_R < start + scores_RV.shape[1])
        picked_R = scores_RV.gather(1, (targets_R - start).clamp(0, scores_RV.shape[1] - 1).unsqueeze(1)).squeeze(1)
        self.target_R[rows] = torch.where(inside_R, picked_R, self.target_R[rows])
        return shrink_R

    @property
    def log_sum_R(self) -> torch.Tensor:
        """log of the sum of exponentials of all scores."""
        return self.maximum_R + self.exponentials_R.log()


def _score(
    skeleton: Skeleton, models: Mapping[str, Weights], finals: Sequence[Activations], tokens_NT: torch.Tensor
) -> dict[str, TokenScores]:
    """Scores every token, with each part of each model's head read once."""
    num_rows = tokens_NT.numel()
    targets_R = torch.roll(tokens_NT.flatten(), -1)
    sums = [_Sums(num_rows) for _ in models]
    # sum over V of exp(original's score) * (original's score - candidate's), shrunk along with the original's sums
    cross = [torch.zeros(num_rows, dtype=torch.float64) for _ in models]
    head = head_name(skeleton)
    for parts in zip(*(table_parts(weights, head) for weights in models.values()), strict=True):
        start = parts[0][0]
        for first in range(0, num_rows, ROWS_AT_ONCE):
            rows = slice(first, min(first + ROWS_AT_ONCE, num_rows))
            numbers_R = torch.arange(rows.start, rows.stop)
            scores = [
                (final.rows(numbers_R) @ table_VH.T).double()
                for final, (_, table_VH) in zip(finals, parts, strict=True)
            ]
            shrinks = [
                one.add(rows, start, scores_RV, targets_R[rows]) for one, scores_RV in zip(sums, scores, strict=True)
            ]
            weight_RV = torch.exp(scores[0] - sums[0].maximum_R[rows].unsqueeze(1))
            for total, scores_RV in zip(cross, scores, strict=True):
                total[rows] = total[rows] * shrinks[0] + (weight_RV * (scores[0] - scores_RV)).sum(1)
    return {
        name: _token_scores(sums[0], candidate, total, tokens_NT)
        for name, candidate, total in zip(list(models)[1:], sums[1:], cross[1:], strict=True)
    }


def _token_scores(original: _Sums, candidate: _Sums, cross_R: torch.Tensor, tokens_NT: torch.Tensor) -> TokenScores:
    kl_R = cross_R / original.exponentials_R - original.log_sum_R + candidate.log_sum_R
    values = (
        original.log_sum_R - original.target_R,
        candidate.log_sum_R - candidate.target_R,
        kl_R.clamp(min=0),
        original.top_R == candidate.top_R,
    )
    return TokenScores(*(value_R.view(tokens_NT.shape)[:, :-1] for value_R in values))
