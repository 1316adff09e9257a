"""Hidden states lie in memory, on a GPU or in files, whole or a rank's own samples: the numbers are the same."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import dsquant
from dsquant.model.activations import Activations
from dsquant.model.passed_on import PassedOn
from dsquant.pipeline import memory

SHAPE = (6, 4, 8)
FIRST, END = 2, 5


def _changed(activations: Activations, values_NTH: torch.Tensor) -> Activations:
    """All ways to write samples FIRST to END - 1."""
    rows_RH = values_NTH.view(-1, SHAPE[2])
    begin, end = FIRST * SHAPE[1], END * SHAPE[1]
    activations.recorder(begin)(rows_RH[begin:end])
    activations.set_samples(FIRST + 1, values_NTH[FIRST + 1 : END] * 2)
    activations.set_rows(torch.tensor([begin + 1, end - 1]), rows_RH[:2])
    activations.add_rows(torch.arange(begin, end, 3), rows_RH[begin:end:3])
    return activations


def test_samples_that_are_held_alone_keep_their_numbers(tmp_path: Path) -> None:
    values_NTH = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    whole = _changed(Activations(torch.zeros(SHAPE)), values_NTH)
    own = _changed(Activations(torch.zeros(END - FIRST, *SHAPE[1:]), first_sample=FIRST), values_NTH)
    in_file = _changed(Activations.in_file(tmp_path / "own", SHAPE), values_NTH)
    rows_R = torch.arange(FIRST * SHAPE[1], END * SHAPE[1])
    for number, found in enumerate((own, in_file)):
        assert torch.equal(found.samples(FIRST, END), whole.samples(FIRST, END))
        assert torch.equal(found.rows(rows_R), whole.rows(rows_R))
        found.save(tmp_path / f"saved-{number}", (FIRST, END))
        kept = Activations.in_file(tmp_path / f"saved-{number}", SHAPE)
        assert torch.equal(kept.samples(FIRST, END), whole.samples(FIRST, END))
        assert not kept.samples(0, FIRST).any() and not kept.samples(END, SHAPE[0]).any()


def test_room_for_hidden_states_is_there_before_they_are(tmp_path: Path) -> None:
    """A full disk behind a memory map would end the process by a signal."""
    path = tmp_path / "hidden"
    Activations.in_file(path, (4, 512, 64))
    assert path.stat().st_blocks * 512 >= path.stat().st_size == 4 * 4 * 512 * 64


def _passed_on(path: Path) -> tuple[PassedOn, Activations, Activations, torch.Tensor]:
    """Hidden states that the next layer gets: what it reads, what takes their place, and the values."""
    values_NTH = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    passed_on = PassedOn(Activations(values_NTH), Activations(torch.zeros(SHAPE)))
    inputs, taking = Activations.in_file(path, SHAPE), Activations(passed_on.values_NTH)
    inputs.passed_on = taking.passed_on = passed_on
    return passed_on, inputs, taking, values_NTH


def test_hidden_states_are_read_from_memory_until_their_place_is_taken_and_then_from_their_file(tmp_path: Path) -> None:
    passed_on, inputs, taking, values_NTH = _passed_on(tmp_path / "hidden")
    assert torch.equal(inputs.samples(0, 2), values_NTH[:2])  # nothing is saved yet
    record, saving = taking.recorder(), threading.Thread(target=passed_on.save, args=(tmp_path / "hidden",))
    saving.start()
    for start in range(0, SHAPE[0], 2):
        found_NTH = inputs.samples(start, start + 2)
        record(-found_NTH.flatten(0, 1))
        assert torch.equal(found_NTH, values_NTH[start : start + 2])
    saving.join()
    assert torch.equal(inputs.samples(0, SHAPE[0]), values_NTH)
    assert torch.equal(taking.samples(0, SHAPE[0]), -values_NTH)


def test_no_place_is_taken_of_hidden_states_that_could_not_be_written(tmp_path: Path) -> None:
    passed_on, inputs, taking, values_NTH = _passed_on(tmp_path / "hidden")
    with pytest.raises(FileNotFoundError):
        passed_on.save(tmp_path / "no folder" / "hidden")
    with pytest.raises(FileNotFoundError):
        taking.recorder()(torch.zeros(SHAPE[1], SHAPE[2]))
    assert torch.equal(inputs.samples(0, SHAPE[0]), values_NTH)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["quality", "best"])
def test_a_gpu_without_room_for_hidden_states_writes_the_same_bytes(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    options: dict[str, Any] = {"calibration": "code", "samples": 32, "seq_len": 256, "device": "cuda", "preset": preset}
    dsquant.awq(tiny_r1, output=tmp_path / "on-the-gpu", evaluate=False, progress=False, **options)
    monkeypatch.setattr(memory, "passing_bytes", lambda *_: 2**60)
    dsquant.awq(tiny_r1, output=tmp_path / "in-files", evaluate=False, progress=False, **options)
    for path in (tmp_path / "on-the-gpu").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "in-files" / path.name).read_bytes()
