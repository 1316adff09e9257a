"""Turns measurements of tokens and layers into the results that a candidate's report shows."""

from collections.abc import Mapping, Sequence

from dsquant.evaluation.intervals import bootstrap_mean
from dsquant.evaluation.ladders import text_scores
from dsquant.evaluation.measures import Measures
from dsquant.evaluation.results import LayerScores, TextScores
from dsquant.model.structure import ROUTER_BIAS, DecoderLayer


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
            router_overlap=None if one.overlap_NT is None else bootstrap_mean(one.overlap_NT.numpy(), confidence, seed),
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
