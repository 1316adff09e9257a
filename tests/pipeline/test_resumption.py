"""A resumed job checks what its earlier run has left: damage ends with exit code 3 and the name of the file."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from dsquant.errors import InputError, Interrupted
from dsquant.jobs.journal import checked_line, read_checked_line
from dsquant.pipeline import job as pipeline
from dsquant.pipeline import resume as resumption
from dsquant.recipes import Recipe

WORK = ".dsquant-work"


def recipe(model: Path, text: Path, output: Path) -> Recipe:
    return Recipe.checked(
        model=str(model), to=("awq", "gguf:Q4_K_M"), output=output, calibration=(str(text),), samples=2, seq_len=16,
        group_size=64, evaluate=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def interrupted(nano_r1: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that stopped behind its first layer."""
    output = tmp_path_factory.mktemp("interrupted") / "out"

    def stop(progress: Any) -> None:
        if progress.layer is not None:
            raise Interrupted("the test stopped it")

    with pytest.raises(Interrupted):
        pipeline.run_job(recipe(nano_r1, text_file, output), report=stop)
    return output


def overwrite(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        file.write(b"\xa5" * 8)


def overwrite_embedding(path: Path) -> None:
    overwrite(
        path, next(tensor.data_offset for tensor in GGUFReader(path).tensors if tensor.name == "token_embd.weight")
    )


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 64)


def edit_journal(output: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = output / WORK / "journal.jsonl"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def checked_again(line: bytes, change: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    return checked_line(change(read_checked_line(line, "a test")))


def edit_line(output: Path, number: int, **notes: Any) -> None:
    def change(lines: list[bytes]) -> list[bytes]:
        lines[number] = checked_again(lines[number], lambda entry: entry | notes)
        return lines

    edit_journal(output, change)


def edit_job(output: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = output / WORK / "job.json"
    path.write_bytes(checked_again(path.read_bytes(), change))


def only_the_recipe(output: Path) -> None:
    edit_job(output, lambda notes: {key: notes[key] for key in ("recipe", "dsquant")})


def of_another_version(output: Path) -> None:
    edit_job(output, lambda notes: notes | {"dsquant": "0.0.9"})


def another_digit(path: Path, before: bytes, after: bytes) -> None:
    raw = path.read_bytes()
    assert before in raw
    path.write_bytes(raw.replace(before, after, 1))


def first_shard(output: Path) -> Path:
    return min((output / "awq").glob("*.safetensors"))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "hidden states overwritten": (lambda out: overwrite(out / WORK / "hidden-1.f32", 100), r"hidden-1\.f32.*damaged"),
    "hidden states cut": (lambda out: cut(out / WORK / "hidden-1.f32"), r"hidden-1\.f32.*size"),
    "hidden states gone": (lambda out: (out / WORK / "hidden-1.f32").unlink(), r"hidden-1\.f32.*gone"),
    "shard overwritten": (lambda out: overwrite(first_shard(out), -40), r"model-00001.*tensor 'model\.embed_tokens"),
    "shard cut": (lambda out: cut(first_shard(out)), r"model-00001.*size"),
    "shard gone": (lambda out: first_shard(out).unlink(), r"model-00001.*gone"),
    "GGUF tensor overwritten": (
        lambda out: overwrite_embedding(next((out / "gguf").glob("*.partial"))),
        r"\.partial: tensor '.*damaged",
    ),
    "scales overwritten": (
        lambda out: overwrite(out / WORK / "scales-model.layers.0.safetensors", -40),
        r"scales-model\.layers\.0.*damaged",
    ),
    "importances cut": (lambda out: cut(out / WORK / "kept-model.layers.0.safetensors"), r"kept-model.*size"),
    "first line gone": (lambda out: edit_journal(out, lambda lines: lines[1:]), r"journal.*first units"),
    "line that is no JSON": (lambda out: edit_journal(out, lambda lines: [b"{bad}\n"]), r"journal\.jsonl, line 1"),
    "digit of the journal": (
        lambda out: another_digit(out / WORK / "journal.jsonl", b'"layer": 0', b'"layer": 1'),
        r"journal\.jsonl, line 2.*checksum",
    ),
    "digit of the job record": (
        lambda out: another_digit(out / WORK / "job.json", b'"samples": 2', b'"samples": 3'),
        r"job\.json.*checksum",
    ),
    "journal of another job": (lambda out: edit_line(out, 0, job="5"), r"journal\.jsonl, line 1.*another job"),
    "kept files of another shape": (lambda out: edit_line(out, 1, kept={"hidden-0.f32": 5}), r"line of .* is damaged"),
    "tensors of another shape": (lambda out: edit_line(out, 0, tensors=None), r"line of embedding is damaged"),
    "job record without its sources": (only_the_recipe, r"job\.json.*shards"),
    "begun by another version": (of_another_version, r"begun by dsquant 0\.0\.9, this is"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_work_file_is_refused(
    kind: str, interrupted: Path, nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    damage, message = DAMAGE[kind]
    output = tmp_path / "out"
    shutil.copytree(interrupted, output)
    damage(output)
    with pytest.raises(InputError, match=message) as refused:
        pipeline.run_job(recipe(nano_r1, text_file, output), resume=True)
    assert "--restart" in str(refused.value) or "remove the folder" in str(refused.value)


@pytest.mark.slow
def test_other_texts_and_another_config_are_refused(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(nano_r1, model)
    shutil.copy(text_file, text)
    job = recipe(model, text, tmp_path / "out")

    def stop(progress: Any) -> None:
        if progress.layer is not None:
            raise Interrupted("the test stopped it")

    with pytest.raises(Interrupted):
        pipeline.run_job(job, report=stop)
    text.write_text(text_file.read_text()[500:])
    with pytest.raises(InputError, match="the calibration texts: not what"):
        pipeline.run_job(job, resume=True)
    shutil.copy(text_file, text)
    another_digit(model / "config.json", b'"rope_theta": 10000', b'"rope_theta": 50000')
    with pytest.raises(InputError, match=r"config\.json: not what"):
        pipeline.run_job(job, resume=True)


def test_every_part_of_what_a_unit_leaves_has_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumption, "PART_BYTES", 100)
    content = bytes(range(250))
    (tmp_path / "hidden-1.f32").write_bytes(content)
    hashes = [hashlib.sha256(content[start : start + 100]).hexdigest() for start in (0, 100, 200)]
    found = resumption.kept_files(tmp_path, ["hidden-1.f32", "not-there"])
    assert found == {"hidden-1.f32": {"bytes": 250, "sha256": hashes}}
