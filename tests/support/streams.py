"""Runs a whole model through dsquant's streaming, as evaluation does, also with scales folded that nobody searched."""

from pathlib import Path

import torch
import torch.nn.functional as F

from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.activations import Activations
from dsquant.model.overlays import Fold, FoldedWeights, ReplacedWeights, fold_of
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import Stream, add_experts, embed, final_norm, head_name, run_dense_part
from dsquant.schemes import Grid, fake_quantize
from dsquant.source.weights import Weights


def stream_logits(
    folder: Path, weights: Weights, tokens: torch.Tensor, batch_samples: int = 2, skeleton: Skeleton | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [N, T, V], and each mixture layer's routed experts, sorted for each token."""
    skeleton = skeleton or Skeleton(open_checkpoint(folder))
    shape = (*tokens.shape, skeleton.config["hidden_size"])
    inputs, outputs, mlp_inputs = (Activations(torch.zeros(shape)) for _ in range(3))
    embed(skeleton, weights, tokens, inputs)
    experts = []
    for layer in skeleton.layers[: skeleton.num_layers]:
        observers = {f"{layer.prefix}.mlp": mlp_inputs.recorder()}
        stream = Stream(weights, inputs, outputs)
        routing = run_dense_part(skeleton, layer, stream, batch_samples, observers)
        if routing is not None:
            add_experts(skeleton, layer, [(stream, mlp_inputs, routing)])
            experts.append(routing.expert_RK.sort(1).values)
        inputs, outputs = outputs, inputs
    hidden = final_norm(skeleton, weights, inputs.samples(0, len(tokens)))
    head = head_name(skeleton)
    return F.linear(weights.activation_quantizer(head)(hidden), weights[head]), experts


def randomly_folded(weights: Weights, skeleton: Skeleton) -> FoldedWeights:
    """The same network with scales in every group: powers of two, whose products are exact."""
    fold, generator = Fold(), torch.Generator().manual_seed(5)
    for group in (group for layer in skeleton.layers for group in layer.scale_groups):
        width = weights.shape(f"{group.consumers[0]}.weight")[1]
        scales_I = 2.0 ** torch.randint(-3, 4, (width,), generator=generator)
        if group.producer_rows is not None:  # one for all columns that a row of the producer feeds
            first = {row: column for column, row in reversed(list(enumerate(group.producer_rows)))}
            scales_I = scales_I[[first[row] for row in group.producer_rows]]
        fold.update(fold_of(weights, group, scales_I))
    return FoldedWeights(weights, fold)


def plainly_rounded(weights: Weights) -> ReplacedWeights:
    """Every linear rounded to 4 bits, its scales searched by nobody."""
    names = [name for name in weights if name.endswith("_proj.weight") and "eh_proj" not in name]
    return ReplacedWeights(weights, {name: fake_quantize(weights[name], Grid(4, 128, True)) for name in names})
