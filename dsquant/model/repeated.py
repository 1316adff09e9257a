"""Tensors that repeat what the network has elsewhere: left out or kept only where they say the same."""

import torch

from dsquant.errors import InputError
from dsquant.model.complete import COMPUTED_SUFFIX, HEAD
from dsquant.model.rotary import plain_frequencies
from dsquant.model.skeleton import Skeleton, network_rotary
from dsquant.model.streaming import EMBEDDING, table_parts
from dsquant.source.checkpoint import Checkpoint


def check_repeated(checkpoint: Checkpoint, skeleton: Skeleton) -> list[str]:
    """Checks the tensors that repeat others, a tied head and the frequencies of old Llamas; returns notes for the user.

    Raises InputError where such a tensor holds other values, so that config and files mean different networks.
    """
    _check_frequencies(checkpoint, skeleton)
    weights = checkpoint.weights
    if not (skeleton.config.get("tie_word_embeddings") and HEAD in weights):
        return []
    same = weights.shape(HEAD) == weights.shape(EMBEDDING)
    parts = zip(table_parts(weights, HEAD), table_parts(weights, EMBEDDING), strict=True) if same else ()
    if not same or not all(torch.equal(head, table) for (_, head), (_, table) in parts):
        raise InputError(
            f"{checkpoint.folder}: config.json ties head and embedding, but tensor {HEAD!r} is not "
            f"{EMBEDDING!r}; set tie_word_embeddings to false if the head is meant, or take config and weights from "
            "one release"
        )
    return [f"{HEAD} repeats the embedding, to which the config ties the head"]


def _check_frequencies(checkpoint: Checkpoint, skeleton: Skeleton) -> None:
    frequencies = [name for name in checkpoint.weights if name.endswith(COMPUTED_SUFFIX)]
    if not frequencies:
        return
    rotary = network_rotary(skeleton.family, checkpoint.config).frequencies_F
    plain = plain_frequencies(skeleton.config["rope_parameters"]["rope_theta"], 2 * len(rotary))
    for name in frequencies:
        found = checkpoint.weights[name].double().cpu()
        # They may be stored in BF16, and before any scaling.
        if not any(
            found.shape == one.shape and torch.allclose(found, one, rtol=0.01, atol=0) for one in (rotary, plain)
        ):
            raise InputError(
                f"{checkpoint.index[name].path}: tensor {name!r} holds other frequencies than config.json's rope_theta "
                "and scaling make; config and weights are of different models"
            )
