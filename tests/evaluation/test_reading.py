"""Weights are read ahead of their use, in its order, in bounded memory."""

from pathlib import Path

import pytest
import torch

from dsquant.evaluation.reading import Reading, units_of
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.skeleton import Skeleton
from dsquant.source.read_ahead import ReadAhead


@pytest.mark.parametrize("room_bytes", [0, 20_000])
def test_every_rank_reads_its_layers_once_and_no_further_ahead_than_there_is_room(
    nano_r1: Path, room_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    begin = ReadAhead.begin
    monkeypatch.setattr(ReadAhead, "begin", lambda own, names: begun.extend(names) or begin(own, names))
    plain = open_checkpoint(nano_r1)
    skeleton = Skeleton(plain)
    seen = set()
    for rank in range(2):
        weights, units = open_checkpoint(nano_r1).weights, list(units_of(skeleton, rank, 2))
        begun.clear()
        reading, used = Reading([weights], iter(units), room_bytes), 0
        for unit in units:
            assert set(unit) <= set(begun), "what is used next has been begun"
            ahead = sum(plain.index[name].num_bytes for name in begun) - used
            largest = max(sum(plain.index[name].num_bytes for name in one) for one in units)
            assert ahead <= room_bytes + 2 * largest
            for name in unit:
                assert torch.equal(weights[name], plain.weights[name])
            used += sum(plain.index[name].num_bytes for name in unit)
            reading.used()
        assert len(begun) == len(set(begun))
        seen |= {name for unit in units for name in unit}
    layers = [f"{layer.prefix}." for layer in skeleton.layers[: skeleton.num_layers]]
    assert seen == {name for name in plain.weights if name.startswith(tuple(layers))}
