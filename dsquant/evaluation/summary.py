"""Turns measurements of tokens and layers into the results of a report: quantiles, intervals of means, layers' scores.

Shape legend: N samples, T predicted tokens of a sample.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dsquant.evaluation.divergence import TokenScores
from dsquant.evaluation.intervals import CONFIDENCE, bootstrap_mean
from dsquant.evaluation.measures import Measures
from dsquant.evaluation.results import Ladder, LayerScores, TextScores
from dsquant.model.structure import ROUTER_BIAS, DecoderLayer

STEPS = {"p01": 0.01, "p05": 0.05, "p10": 0.1, "median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}
POSITION_BINS = 32


def ladder(values: np.ndarray) -> Ladder:
    """Returns mean, extremes and quantiles of one number per token, interpolated linearly as llama-perplexity does."""
    steps = dict(zip(STEPS, (float(value) for value in np.quantile(values, list(STEPS.values()))), strict=True))
    return Ladder(mean=float(values.mean()), minimum=float(values.min()), maximum=float(values.max()), **steps)


def text_scores(scores: TokenScores, confidence: float = CONFIDENCE, seed: int = 0) -> TextScores:
    """Summarizes the scores of one text's tokens."""
    nll_original_NT, nll_NT = scores.nll_original_NT.numpy(), scores.nll_candidate_NT.numpy()
    kl_NT, reverse_NT = scores.kl_NT.numpy(), scores.kl_reverse_NT.numpy()
    delta_p_NT = np.exp(-nll_NT) - np.exp(-nll_original_NT)
    log_ratio = bootstrap_mean(nll_NT - nll_original_NT, confidence, seed)
    with np.errstate(over="ignore"):  # a broken candidate's perplexity may be past what a double holds
        return TextScores(
            tokens=kl_NT.size,
            perplexity_original=float(np.exp(nll_original_NT.mean())),
            perplexity=float(np.exp(nll_NT.mean())),
            log_ratio=log_ratio,
            perplexity_ratio=log_ratio.transformed(lambda value: float(np.exp(value))),
            mean_kl=bootstrap_mean(kl_NT, confidence, seed),
            mean_kl_reverse=bootstrap_mean(reverse_NT, confidence, seed),
            kl=ladder(kl_NT),
            kl_reverse=ladder(reverse_NT),
            top1_agreement=bootstrap_mean(scores.same_top_NT.numpy(), confidence, seed, kind="share"),
            top5_agreement=bootstrap_mean(scores.top5_overlap_NT.numpy(), confidence, seed, kind="share"),
            delta_p=ladder(delta_p_NT),
            delta_p_rms=float(np.sqrt((delta_p_NT**2).mean())),
            kl_by_position=_by_position(scores.kl_NT),
        )


def _by_position(values_NT: torch.Tensor) -> tuple[tuple[int, float], ...]:
    bins = torch.arange(values_NT.shape[1]).tensor_split(min(POSITION_BINS, values_NT.shape[1]))
    means_T = values_NT.mean(0)
    return tuple((int(positions[0]), float(means_T[positions].mean())) for positions in bins)


def scores_by_text(
    measures: Measures, samples: Mapping[str, slice], confidence: float, seed: int
) -> dict[str, TextScores]:
    """Summarizes the scores of every text; `seed` is that of the bootstrap's draws."""
    return {
        text: text_scores(measures.tokens.of_samples(part.start, part.stop), confidence, seed)
        for text, part in samples.items()
    }


def layer_scores(
    measures: Measures, layers: Sequence[DecoderLayer], confidence: float, seed: int
) -> tuple[LayerScores, ...]:
    """Summarizes the measurements of every layer; `seed` is that of the bootstrap's draws."""
    return tuple(
        LayerScores(
            index=layer.index,
            name=layer.prefix,
            hidden_error=one.hidden_error,
            local_error=one.local_error,
            local_attention_error=one.local_attention_error,
            local_mlp_error=one.local_mlp_error,
            router_overlap=None
            if one.overlap_NT is None
            else bootstrap_mean(one.overlap_NT.numpy(), confidence, seed, kind="share"),
            local_router_overlap=one.local_overlap,
            router_weight_distance=one.weight_distance,
            load_shift=one.load_shift,
            kl=kl,
        )
        for layer, one, kl in zip(layers, measures.layers, measures.lens_kl, strict=True)
    )


def routers_of(layers: Sequence[DecoderLayer]) -> frozenset[str]:
    """Returns the names of all routers' tensors."""
    prefixes = [layer.router.removesuffix(".weight") for layer in layers if layer.router is not None]
    return frozenset(f"{prefix}.{kind}" for prefix in prefixes for kind in ("weight", ROUTER_BIAS))
