"""What an evaluation needs, from shapes alone: resident memory and disk for hidden states."""

import math
from dataclasses import dataclass

from dsquant.evaluation.divergence import ROWS_AT_ONCE as SCORED_AT_ONCE
from dsquant.evaluation.lockstep import LENS_TOKENS
from dsquant.evaluation.weights import ELEMENTS_AT_ONCE
from dsquant.model.activations import RELEASE_BYTES
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import ROWS_AT_ONCE, VOCABULARY_AT_ONCE
from dsquant.model.structure import DecoderLayer
from dsquant.source.weights import Weights

FLOAT, DOUBLE = 4, 8
# What libraries load and keep when they first run: 54 MiB were measured on tiny-r1.
LIBRARIES = 128 * 2**20


@dataclass(frozen=True)
class Needs:
    """Bytes."""

    memory: int
    """Resident memory beyond what the process has at the start."""
    disk: int
    """For hidden states, while the evaluation lasts."""


def needs(
    skeleton: Skeleton, weights: Weights, num_samples: int, seq_len: int, num_candidates: int, batch_samples: int
) -> Needs:
    """Works out what an evaluation needs.

    Args:
        skeleton: the network.
        weights: the original's.
        num_samples: samples of all texts.
        seq_len: tokens of a sample.
        num_candidates: candidates that are run together.
        batch_samples: samples that pass attention together.

    Returns:
        Memory and disk.
    """
    hidden, num_rows = skeleton.config["hidden_size"], num_samples * seq_len
    scored = num_rows + skeleton.num_layers * min(LENS_TOKENS, num_rows)
    row = FLOAT * hidden
    # The original and its second run have four files of hidden states, a candidate four of twice the size.
    files = [num_rows * row] * 8 + [2 * num_rows * row] * 4 * num_candidates + [scored * row] * (2 + num_candidates)
    layers = [
        _layer(skeleton, weights, layer, batch_samples * seq_len) for layer in skeleton.layers[: skeleton.num_layers]
    ]
    vocabulary = min(VOCABULARY_AT_ONCE, skeleton.config["vocab_size"])
    # While a part of every table is read, the parts before it are still there.
    tables = FLOAT * vocabulary * hidden * (2 * (num_candidates + 1) + 1)
    parts = 8 * DOUBLE * SCORED_AT_ONCE * vocabulary
    sums = scored * (num_candidates + 1) * 2 * 14 * DOUBLE
    mapped = sum(min(size, RELEASE_BYTES) for size in files)
    return Needs(max(*layers, tables + parts + sums) + mapped + LIBRARIES, sum(files))


def _layer(skeleton: Skeleton, weights: Weights, layer: DecoderLayer, batch_tokens: int) -> int:
    """The dense part of the original and of one candidate at once; or one expert of each."""
    sizes = {linear: math.prod(weights.shape(f"{linear}.weight")) for linear in layer.linears}
    routed = {linear for mlp in layer.experts for linear in mlp.linears}
    dense = [size for linear, size in sizes.items() if linear not in routed]
    widest = max(weights.shape(f"{linear}.weight")[0] for linear in layer.attention_linears)
    working = max(6 * FLOAT * batch_tokens * widest, 4 * DOUBLE * ELEMENTS_AT_ONCE)
    needs = [FLOAT * (2 * sum(dense) + 2 * max(dense)) + working]
    for mlp in layer.experts[:1]:
        expert = sum(sizes[linear] for linear in mlp.linears)
        rows = 6 * FLOAT * ROWS_AT_ONCE * skeleton.config["hidden_size"]
        needs.append(FLOAT * 3 * expert + rows + 4 * DOUBLE * ELEMENTS_AT_ONCE)
    return max(needs)
