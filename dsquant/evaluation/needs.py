"""Computes what an evaluation needs, from shapes alone: resident memory and disk for hidden states."""

import math
from dataclasses import dataclass

import torch

from dsquant.evaluation.divergence import ROWS_AT_ONCE as SCORED_AT_ONCE
from dsquant.evaluation.divergence import ComparedModels
from dsquant.evaluation.lockstep import LENS_TOKENS
from dsquant.evaluation.reading import EXPERTS_QUEUED
from dsquant.evaluation.weight_errors import ELEMENTS_AT_ONCE
from dsquant.model.activations import RELEASE_BYTES
from dsquant.model.streaming import ROWS_AT_ONCE, VOCABULARY_AT_ONCE
from dsquant.model.structure import DecoderLayer

FLOAT, DOUBLE = 4, 8
# What libraries load and keep when they first run: 54 MiB were measured on tiny-r1.
LIBRARIES = 128 * 2**20


@dataclass(frozen=True)
class EvaluationNeeds:
    """Memory and disk in bytes."""

    memory: int
    """Resident memory beyond what the process has at the start."""
    disk: int
    """For hidden states, while the evaluation lasts."""


def needs(models: ComparedModels, num_samples: int, seq_len: int) -> EvaluationNeeds:
    """Computes the memory and disk that an evaluation of samples needs, for all texts together."""
    skeleton, num_candidates = models.skeleton, len(models.candidates)
    hidden, num_rows = skeleton.config["hidden_size"], num_samples * seq_len
    scored = num_rows + skeleton.num_layers * min(LENS_TOKENS, num_rows)
    row = FLOAT * hidden
    # The original and its second run have four files of hidden states, a candidate seven: it reads the original's too.
    files = [num_rows * row] * (8 + 7 * num_candidates) + [scored * row] * (2 + num_candidates)
    layers = [_layer(models, layer, seq_len) for layer in skeleton.layers[: skeleton.num_layers]]
    vocabulary = min(VOCABULARY_AT_ONCE, skeleton.config["vocab_size"])
    # While a part of every table is read, the parts before it are still there.
    tables = FLOAT * vocabulary * hidden * (2 * (num_candidates + 1) + 1)
    # On a GPU, of each model but the original: scores in both precisions and their differences.
    parts = (5 * num_candidates // 2 + 6) * DOUBLE * SCORED_AT_ONCE * vocabulary
    sums = scored * (num_candidates + 1) * 2 * 14 * DOUBLE
    mapped = sum(min(size, RELEASE_BYTES) for size in files)
    return EvaluationNeeds(max(*layers, tables + parts + sums) + mapped + LIBRARIES, sum(files))


def _layer(models: ComparedModels, layer: DecoderLayer, seq_len: int) -> int:
    """Returns bytes: the dense part of the original and of one candidate at once, or one expert of each."""
    weights, batch_tokens = models.original, models.batch_samples * seq_len
    sizes = {linear: math.prod(weights.shape(f"{linear}.weight")) for linear in layer.linears}
    routed = {linear for mlp in layer.experts for linear in mlp.linears}
    dense = [size for linear, size in sizes.items() if linear not in routed]
    widest = max(weights.shape(f"{linear}.weight")[0] for linear in layer.attention_linears)
    working = max(6 * FLOAT * batch_tokens * widest, 4 * DOUBLE * ELEMENTS_AT_ONCE)
    needs = [FLOAT * (2 * sum(dense) + 2 * max(dense)) + working]
    for mlp in layer.experts[:1]:
        expert = sum(sizes[linear] for linear in mlp.linears)
        rows = 6 * FLOAT * ROWS_AT_ONCE * models.skeleton.config["hidden_size"]
        queued = EXPERTS_QUEUED if models.original.device.type == "cuda" else 0
        needs.append(FLOAT * 3 * expert * (1 + queued) + rows + 4 * DOUBLE * ELEMENTS_AT_ONCE)
    return max(needs)


def stays_on_gpu(device: torch.device, num_bytes: int) -> bool:
    """Returns whether so many bytes are left on a GPU, within the process's share of it; False on a CPU."""
    if device.type != "cuda":
        return False
    try:
        torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return False
    torch.cuda.empty_cache()
    return True
