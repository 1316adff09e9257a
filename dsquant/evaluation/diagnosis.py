"""Names broken parts of a candidate: tensors, routers and layers that stand out from others of their kind.

The limits are well above the errors of healthy weights at two to eight bits (2 bits: about 0.35; 4 bits: 0.07 to 0.2)
and well below those of mistakes (a zeroed tensor is off by 1, swapped or misplaced codes by 1.4, a router that was not
compensated by the size of the folded scales).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from dsquant.evaluation.results import Finding, LayerScores, WeightError
from dsquant.evaluation.weight_errors import by_kind, module_kind

# A tensor's limit: this multiple of the median of its kind, but never below or above these.
TENSOR_FACTOR, TENSOR_FLOOR, TENSOR_CEILING = 6.0, 0.3, 0.7
# A router and its bias are stored in BF16 or better: rounding is off by 0.004.
ROUTER_CEILING = 0.05
# The limit of a layer's update: this multiple of the median of the layers, but never below.
LAYER_FACTOR, LAYER_FLOOR = 3.0, 0.15
TENSORS_OF_A_LAYER, MOST_FINDINGS = 3, 50


def diagnose(
    layers: Sequence[LayerScores], errors: Sequence[WeightError], routers: frozenset[str]
) -> tuple[Finding, ...]:
    """Finds the outliers of one candidate, ordered by layer; within a layer tensors first, the worst first.

    `errors` are those of all its tensors, `routers` the names of the routers' tensors, which no format quantizes.
    """
    found = [*_tensors(errors, routers), *_routers(layers), *_layers(layers)]
    order = {"weight": 0, "router": 1, "layer": 2}
    found.sort(key=lambda one: (-1 if one.layer is None else one.layer, order[one.kind]))
    return tuple(found[:MOST_FINDINGS])


def _tensors(errors: Sequence[WeightError], routers: frozenset[str]) -> list[Finding]:
    medians = by_kind(errors, median)
    by_layer: dict[int | None, list[Finding]] = defaultdict(list)
    for error in errors:
        typical = TENSOR_FACTOR * medians[module_kind(error.name)]
        limit = min(max(typical, TENSOR_FLOOR), TENSOR_CEILING) if error.name not in routers else ROUTER_CEILING
        if not error.relative <= limit:
            by_layer[error.layer].append(
                Finding("weight", error.layer, error.name, error.relative, limit, _of_tensor(error, limit, routers))
            )
    worst = (sorted(found, key=lambda one: -one.value)[:TENSORS_OF_A_LAYER] for found in by_layer.values())
    return [finding for found in worst for finding in found]


def _of_tensor(error: WeightError, limit: float, routers: frozenset[str]) -> str:
    where = "" if error.layer is None else f"layer {error.layer}: "
    if not math.isfinite(error.relative):
        return f"{where}tensor {error.name!r} holds values that are not finite, or differs where the original is zero"
    words = f"{where}tensor {error.name!r} is off by {error.relative:.0%} of its size with folded scales undone "
    words += f"(expected at most {limit:.0%})"
    if error.name in routers:
        return words + "; was the router compensated for the scales folded into its norm?"
    return words + ("; it is nearly zero" if abs(error.relative - 1) < 0.01 else "")


def _routers(layers: Sequence[LayerScores]) -> list[Finding]:
    overlaps = {layer: layer.local_router_overlap for layer in layers if layer.local_router_overlap is not None}
    if not overlaps:
        return []
    limit = 1 - max(LAYER_FACTOR * (1 - median(overlaps.values())), LAYER_FLOOR)
    return [
        Finding(
            "router", layer.index, layer.name, overlap, limit,
            f"layer {layer.index}: on the original's inputs its router chooses {overlap:.0%} of the original's experts "
            f"(expected at least {limit:.0%})",
        )
        for layer, overlap in overlaps.items()
        if not overlap >= limit
    ]  # fmt: skip


def _layers(layers: Sequence[LayerScores]) -> list[Finding]:
    finite = [layer.local_error for layer in layers if math.isfinite(layer.local_error)]
    typical = median(finite) if finite else 0.0
    limit = max(LAYER_FACTOR * typical, LAYER_FLOOR)
    return [
        Finding("layer", layer.index, layer.name, layer.local_error, limit, _of_layer(layer, typical))
        for layer in layers
        if not layer.local_error <= limit
    ]


def _of_layer(layer: LayerScores, typical: float) -> str:
    attention, mlp = _share(layer.local_attention_error), _share(layer.local_mlp_error)
    return (
        f"layer {layer.index}: on the original's inputs its update is off by {_share(layer.local_error)} (attention "
        f"{attention}, MLP {mlp}; the layers' median is {typical:.0%})"
    )


def _share(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "not finite"
