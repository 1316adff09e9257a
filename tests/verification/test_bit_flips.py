"""Bits flipped at random in every file of every kind of output: each is found, or changes nothing that is read.

An interrupted job is no output: there a flip is harmless where `--resume` refuses, or ends with the bytes of a run
that nothing disturbed.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import QWEN3, add_tokenizer, make_dense, make_pico_r1
from small_jobs import changed_copy, contents, noise

import dsquant
from dsquant.errors import DsquantError, Interrupted

pytestmark = pytest.mark.slow

SEED = 20261128
# A thousand together.
FLIPS, FLIPS_IN_PATCH, FLIPS_OF_A_JOB = 840, 60, 100
JOB = {"samples": 4, "seq_len": 32, "group_size": 64, "evaluate": False, "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random R1 of three layers with an MTP layer."""
    return add_tokenizer(make_pico_r1(tmp_path_factory.mktemp("flips") / "pico", num_hidden_layers=2))


def one_format(to: str) -> Callable[[Path, Path, Path], Path]:
    def make(folder: Path, model: Path, text: Path) -> Path:
        return dsquant.awq(model, output=folder / "out", to=to, calibration=text, **JOB).output

    return make


def several_formats(folder: Path, model: Path, text: Path) -> Path:
    to = ["awq", "compressed-tensors", "gguf:Q4_K_M"]
    return dsquant.awq(model, output=folder / "out", to=to, calibration=text, **JOB).output


def converted_and_split(folder: Path, model: Path, text: Path) -> Path:
    fields = {key: JOB[key] for key in ("samples", "seq_len", "evaluate", "progress")}
    return dsquant.gguf(
        model, type="Q4_K_M", output=folder / "out", split_max_size="200KiB", calibration=text, **fields
    ).output


def dense_with_chosen_widths(folder: Path, model: Path, text: Path) -> Path:
    dense = add_tokenizer(make_dense(folder / "dense", QWEN3))
    fields = {**JOB, "preset": "compact", "target_bits": 5.0}
    return dsquant.awq(dense, output=folder / "out", to="compressed-tensors", calibration=text, **fields).output


def patched(folder: Path, model: Path, text: Path) -> Path:
    """The output of a new release, made from the old one by a patch; the patch and the old output lie beside it."""
    dsquant.awq(model, output=folder / "old", calibration=text, **JOB)
    changed_copy(model, folder / "release", noise(0.05, seed=7))
    made = dsquant.delta(folder / "old", folder / "release", output=folder / "delta", progress=False)
    return dsquant.apply_patch(made.patch, folder / "old", output=folder / "out", progress=False).output


def released(folder: Path, model: Path, text: Path) -> Path:
    from dsquant.releases.recipe import ReleaseRecipe
    from dsquant.releases.release_job import run_recipe

    recipe = {
        "model": str(model),
        "output": str(folder / "out"),
        "calibration": {"texts": [str(text)], "samples": 4, "seq_len": 32},
        "quantize": [
            {"name": "awq", "to": ["awq", "compressed-tensors"], "group_size": 64},
            {"name": "q8", "type": "Q8_0", "calibrate": False},
        ],
        "evaluate": {"texts": [str(text)], "samples": 1, "seq_len": 32},
    }
    return run_recipe(ReleaseRecipe.model_validate(recipe)).output


KINDS = {
    "awq": one_format("awq"),
    "compressed-tensors": one_format("compressed-tensors"),
    "gguf": converted_and_split,
    "several formats": several_formats,
    "chosen widths": dense_with_chosen_widths,
    "patched": patched,
    "released": released,
}
_made: dict[str, Path] = {}


@pytest.fixture(params=KINDS)
def output(
    request: pytest.FixtureRequest, model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished output of each kind; tests leave it as they found it."""
    if request.param not in _made:
        _made[request.param] = KINDS[request.param](tmp_path_factory.mktemp("flips"), model, text_file)
    return _made[request.param]


def flips(folder: Path, count: int, seed: int) -> Iterator[tuple[Path, int, int]]:
    """File, byte and bit: every file at least once, then files at random."""
    chance = random.Random(seed)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    for path in [*files, *(chance.choice(files) for _ in range(count - len(files)))]:
        yield path, chance.randrange(path.stat().st_size), chance.randrange(8)


def flip(path: Path, byte: int, bit: int) -> bytes:
    """Flips a bit, in a file of its own: it may be a hard link. Returns what was there."""
    before = path.read_bytes()
    content = bytearray(before)
    content[byte] ^= 1 << bit
    path.unlink()
    path.write_bytes(content)
    return before


def test_every_flip_in_a_finished_output_is_found_and_its_file_named(output: Path) -> None:
    assert dsquant.verify(output, progress=False).ok
    missed = []
    for path, byte, bit in flips(output, FLIPS // len(KINDS), SEED):
        before = flip(path, byte, bit)
        found = dsquant.verify(output, progress=False).findings
        path.write_bytes(before)
        if str(path.relative_to(output)) not in [finding.file for finding in found]:
            missed.append((path, byte, bit, found))
    assert not missed
    assert dsquant.verify(output, progress=False).ok


def test_every_flip_in_a_patch_is_refused_or_makes_the_same_output(
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    wanted = contents(patched(tmp_path / "made", model, text_file))
    wrong = []
    for number, (path, byte, bit) in enumerate(_in_a_zip(tmp_path / "made" / "delta.patch")):
        before, output = flip(path, byte, bit), tmp_path / f"out-{number}"
        try:
            dsquant.apply_patch(path, tmp_path / "made" / "old", output=output, progress=False)
        except DsquantError:
            if output.exists():
                wrong.append((byte, bit, "left behind"))
        else:
            if contents(output) != wanted:
                wrong.append((byte, bit, "another output"))
            shutil.rmtree(output)
        path.write_bytes(before)
    assert not wrong


def _in_a_zip(patch: Path) -> Iterator[tuple[Path, int, int]]:
    """Half of the flips anywhere, half in the list of members at its end, where few bytes mean much."""
    chance, size = random.Random(SEED), patch.stat().st_size
    for number in range(FLIPS_IN_PATCH):
        yield patch, chance.randrange(0 if number % 2 else size - 4000, size), chance.randrange(8)


def interrupted_awq(folder: Path, model: Path, text: Path, **options: Any) -> Path:
    dsquant.awq(model, output=folder, to=["awq", "gguf:Q4_K_M"], calibration=text, **JOB, **options)
    return folder


def interrupted_gguf(folder: Path, model: Path, text: Path, **options: Any) -> Path:
    fields = {key: JOB[key] for key in ("samples", "seq_len", "evaluate", "progress")}
    dsquant.gguf(model, type="Q4_K_M", output=folder, calibration=text, **fields, **options)
    return folder


def interrupted_delta(folder: Path, model: Path, text: Path, **options: Any) -> Path:
    old, release = folder.parent / "old", folder.parent / "release"
    if not old.exists():
        dsquant.awq(model, output=old, calibration=text, **JOB)
        changed_copy(model, release, noise(0.05, seed=7))
    dsquant.delta(old, release, output=folder, progress=False, **options)
    return folder


JOBS = {"awq": interrupted_awq, "gguf": interrupted_gguf, "delta": interrupted_delta}


def stop_after(units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends a job as a signal would, once so many units are in its journal."""
    from dsquant.jobs.journal import Journal

    append, done = Journal.append, 0

    def counted(journal: Journal, unit: str, **notes: Any) -> None:
        nonlocal done
        append(journal, unit, **notes)
        done += 1
        if done == units:
            raise Interrupted("here")

    monkeypatch.setattr(Journal, "append", counted)


@pytest.mark.parametrize("kind", JOBS)
def test_every_flip_in_an_interrupted_job_is_refused_or_mended(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In its journal, its own record, its hidden states, and what it has written so far."""
    make = JOBS[kind]
    wanted = contents(make(tmp_path / "whole", model, text_file))
    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(3, patch)
        make(output, model, text_file)
    kept = Path(shutil.copytree(output, tmp_path / "kept"))
    wrong = []
    for path, byte, bit in [*_of_the_job(kept), *flips(kept, FLIPS_OF_A_JOB // len(JOBS) // 2, SEED)]:
        shutil.rmtree(output)
        shutil.copytree(kept, output)
        flip(output / path.relative_to(kept), byte, bit)
        try:
            make(output, model, text_file, resume=True)
        except DsquantError:
            continue
        if contents(output) != wanted:
            wrong.append((str(path.relative_to(kept)), byte, bit))
    assert not {name: sum(found == name for found, _, _ in wrong) for name, _, _ in wrong}


def _of_the_job(kept: Path) -> Iterator[tuple[Path, int, int]]:
    """More flips in journal and record: what they tell ends in the output's record."""
    chance = random.Random(SEED)
    for name in ("journal.jsonl", "job.json"):
        path = kept / ".dsquant-work" / name
        for _ in range(FLIPS_OF_A_JOB // len(JOBS) // 4):
            yield path, chance.randrange(path.stat().st_size), chance.randrange(8)
