"""Layers streamed from disk compute what transformers' whole model computes."""

from pathlib import Path

import torch
from checkpoints import full_model, make_pico_r1
from streams import stream_logits

from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.overlays import ReplacedWeights, ResidentWeights
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import loaded
from dsquant.source.checkpoint import stored_parts


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_a_streamed_r1_equals_the_whole_model(tmp_path: Path) -> None:
    folder = make_pico_r1(tmp_path / "model", outliers=True)
    tokens = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    weights = open_checkpoint(folder).weights
    with torch.no_grad():
        wanted = full_model(folder, weights)(tokens).logits
    assert relative_error(stream_logits(folder, weights, tokens)[0], wanted) < 1e-5


def test_the_batch_size_does_not_change_the_result(tmp_path: Path) -> None:
    folder = make_pico_r1(tmp_path / "model")
    tokens = torch.randint(0, 300, (5, 16), generator=torch.Generator().manual_seed(1))
    weights = open_checkpoint(folder).weights
    one, routing_one = stream_logits(folder, weights, tokens, batch_samples=1)
    all_together, routing_all = stream_logits(folder, weights, tokens, batch_samples=5)
    assert relative_error(one, all_together) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(routing_one, routing_all, strict=True))


def test_the_skeleton_expects_exactly_the_stored_tensors_of_r1(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_pico_r1(tmp_path / "model"))
    expected = Skeleton(checkpoint).expected_shapes()
    assert expected == {name: checkpoint.weights.shape(name) for name in checkpoint.weights}


def test_weights_that_are_in_memory_are_not_read_ahead(tmp_path: Path) -> None:
    weights = open_checkpoint(make_pico_r1(tmp_path / "model")).weights
    kept, other = "model.norm.weight", "lm_head.weight"
    resident, replaced = ResidentWeights(weights), ReplacedWeights(weights, {kept: torch.ones(1)})
    resident[kept]
    assert resident.prefetch([kept]) == replaced.prefetch([kept]) == 0
    assert resident.prefetch([kept, other]) > 0


def test_a_layer_reads_each_of_its_weights_once(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_pico_r1(tmp_path / "model"))
    names = [name for name in checkpoint.weights if name.startswith("model.layers.0.")]
    before = checkpoint.index.bytes_read
    with loaded(Skeleton(checkpoint), "model.layers.0", checkpoint.weights):
        pass
    stored = {part for name in names for part in stored_parts(checkpoint.index, name)}
    assert checkpoint.index.bytes_read - before == sum(checkpoint.index[name].num_bytes for name in stored)
