"""Verification: a changed bit anywhere, missing and foreign files, packages and sources that are not there."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from outputs import OUTPUTS, place_of

import dsquant
from dsquant.cli import main
from dsquant.errors import InputError
from dsquant.verification import damage
from dsquant.verification.checks import Verification


@pytest.fixture
def damaged(output: Path) -> Iterator[Callable[[str, int, int], Verification]]:
    """Changes one bit of a file and verifies its format's folder; the bit is changed back afterwards."""
    before: dict[Path, bytes] = {}

    def verify(name: str, byte: int, bit: int = 0) -> Verification:
        path = output / name
        before.setdefault(path, path.read_bytes())
        content = bytearray(before[path])
        content[byte] ^= 1 << bit
        path.write_bytes(content)
        folder = path.parent if path.parent != output else output
        try:
            return dsquant.verify(folder, progress=False)
        finally:
            path.write_bytes(before[path])

    yield verify
    for path, content in before.items():
        path.write_bytes(content)


def test_an_undamaged_output_passes_with_every_value_compared(output: Path, nano_r1: Path) -> None:
    found = dsquant.verify(output, everything=True, progress=False)
    assert found.ok and found.source == str(nano_r1) and not found.notes
    assert set(found.compared) == {"awq", "compressed-tensors", "gguf:Q4_K_M"}
    assert min(found.compared.values()) > 30


@pytest.mark.parametrize("flips", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_every_random_bit_flip_is_found_and_named(
    output: Path, damaged: Callable[[str, int, int], Verification], flips: int
) -> None:
    chance = random.Random(flips)
    files = [path for path in sorted(output.rglob("*")) if path.is_file()]
    for _ in range(flips):
        path = chance.choice(files)
        place, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        found = damaged(str(path.relative_to(output)), place, bit)
        assert path.name in [finding.file for finding in found.findings], (path, place, bit)
        assert all(finding.where for finding in found.findings)


def test_a_flip_in_a_tensor_names_the_tensor(
    output: Path, damaged: Callable[..., Verification], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage, "PART_BYTES", 4096)  # a file is read in many parts
    for name in OUTPUTS:
        record = json.loads((output / name / "dsquant.json").read_text())
        weights = {file: entry for file, entry in record["files"].items() if "tensors" in entry}
        for file, entry in weights.items():
            last = list(entry["tensors"])[-1]
            found = damaged(f"{name}/{file}", place_of(output / name / file, last)[0] + 1)
            assert [(finding.file, finding.where) for finding in found.findings] == [(file, repr(last))]


def test_a_flip_outside_of_tensors_names_the_region(output: Path, damaged: Callable[..., Verification]) -> None:
    shard = next(iter(sorted((output / "awq").glob("*.safetensors"))))
    raw = shard.read_bytes()
    header_bytes = 8 + struct.unpack("<Q", raw[:8])[0]
    wanted = {
        3: "header length",
        12: "header metadata",
        raw.index(b'"model.embed_tokens.weight"') + 4: "header entry of 'model.embed_tokens.weight'",
        raw.index(b'"data_offsets"') + 16: "header entry of 'model.embed_tokens.weight'",
    }
    if raw[header_bytes - 1] == 32:
        wanted[header_bytes - 1] = "header padding"
    for byte, where in wanted.items():
        assert [finding.where for finding in damaged(f"awq/{shard.name}", byte).findings] == [where]
    index = (output / "awq" / "model.safetensors.index.json").read_bytes()
    place = index.index(b'"model.norm.weight"') + 3
    (finding,) = damaged("awq/model.safetensors.index.json", place).findings
    assert finding.where == "entry of 'model.norm.weight'"


def test_a_flip_in_a_gguf_header_or_its_padding_is_named(output: Path, damaged: Callable[..., Verification]) -> None:
    path = next(path for path in (output / "gguf").glob("pico*.gguf"))
    raw, name = path.read_bytes(), f"gguf/{path.name}"
    tensors = json.loads((output / "gguf" / "dsquant.json").read_text())["files"][path.name]["tensors"]
    first, padded = next(iter(tensors)), None
    for byte, where in {
        1: "magic, version or number of tensors",
        raw.index(b"general.architecture") + 2: "keys",
        raw.index(first.encode()) + 2: f"info of {first!r}",
    }.items():
        assert [finding.where for finding in damaged(name, byte).findings] == [where]
    from gguf import GGUFReader

    for tensor in GGUFReader(path).tensors:
        end = int(tensor.data_offset) + int(tensor.n_bytes)
        if end % 32:
            padded = damaged(name, end)
            assert [finding.where for finding in padded.findings] == [f"padding after {tensor.name!r}"]
            break


def test_missing_foreign_and_renamed_files_are_found(output: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(output / "awq", tmp_path / "moved"))
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert dsquant.verify(copy, progress=False).ok
    (copy / "tokenizer.json").rename(copy / "tokenizer.jsom")
    (copy / "model.safetensors").write_bytes(b"x")
    found = {(finding.file, finding.problem) for finding in dsquant.verify(copy, progress=False).findings}
    foreign = "not part of the output"
    assert found == {("tokenizer.json", "missing"), ("tokenizer.jsom", foreign), ("model.safetensors", foreign)}


def test_whatever_lies_beside_the_recorded_files_is_named(output: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(output / "awq", tmp_path / "moved"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    os.mkfifo(copy / "pipe")
    (copy / "elsewhere").symlink_to(outside)
    (copy / "nowhere").symlink_to("absent")
    (copy / "round").symlink_to("round")
    (copy / "empty" / "inner").mkdir(parents=True)
    (copy / "folder").mkdir()
    (copy / "folder" / "\x1b[2J\udcff").write_text("x")
    subprocess.run(["mkdir", "-p", copy / "/".join(["d"] * 1100)], check=True)
    (copy / ".cache" / "own").mkdir(parents=True)
    (copy / ".cache" / "own" / "file").write_text("x")
    (copy / ".git" / "refs").mkdir(parents=True)
    (copy / ".git" / "HEAD").write_text("x")
    (copy / ".git" / "hook").symlink_to(outside / "secret")
    foreign = "not part of the output"
    found = dsquant.verify(copy, progress=False)
    assert {finding.file: finding.problem for finding in found.findings} == {
        "pipe": f"a named pipe, {foreign}",
        "elsewhere": f"a link, {foreign}",
        "nowhere": f"a link, {foreign}",
        "round": f"a link, {foreign}",
        "empty/inner": f"an empty folder, {foreign}",
        "folder/\\x1b[2J\\\\xff": foreign,
        "/".join(["d"] * 1100): f"an empty folder, {foreign}",
        ".cache/own/file": foreign,
        ".git/hook": f"a link, {foreign}",
    }
    assert [note.split(" belongs ")[0] for note in found.notes] == [".git (1 file, 1 B)"]
    told = CliRunner().invoke(main, ["verify", str(copy)])
    subprocess.run(["rm", "-r", copy / "d"], check=True)  # too deep for Python's own
    assert told.exit_code == 3 and "\x1b" not in told.stdout


def test_what_the_hubs_client_keeps_in_a_download_is_told_of_and_no_damage(output: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(output / "awq", tmp_path / "moved"))
    download = copy / ".cache" / "huggingface" / "download"
    download.mkdir(parents=True)
    (download.parent / ".gitignore").write_text("*")
    (download / "config.json.metadata").write_text("commit")
    found = dsquant.verify(copy, progress=False)
    assert found.ok and found.notes[0].startswith(".cache/huggingface (2 files, 7 B)")


def test_a_snapshot_in_the_hubs_cache_is_verified_and_no_link_is_followed_elsewhere(
    output: Path, tmp_path: Path
) -> None:
    """There, every file is a link into a folder of blobs beside it."""
    snapshot, blobs = tmp_path / "models--me--out" / "snapshots" / "00", tmp_path / "models--me--out" / "blobs"
    shutil.copytree(output / "awq", snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..", "..", "blobs", str(number)))
    assert dsquant.verify(snapshot, progress=False).ok
    config = snapshot / "config.json"
    shutil.copy(config, tmp_path / "config.json")  # the right bytes, but not of this output
    config.unlink()
    config.symlink_to(tmp_path / "config.json")
    (finding,) = dsquant.verify(snapshot, progress=False).findings
    assert finding.file == "config.json" and "leads out of the output" in finding.problem
    config.unlink()
    os.mkfifo(config)
    (finding,) = dsquant.verify(snapshot, progress=False).findings
    assert finding.problem == "a named pipe instead of a file"


@pytest.mark.parametrize(("name", "missing", "package"), [
    ("awq", "datasets", "autoawq"),
    ("awq", "awq", "autoawq"),
    ("compressed-tensors", "compressed_tensors", "compressed-tensors"),
    ("gguf", "gguf", "gguf"),
])  # fmt: skip
def test_a_check_whose_package_is_missing_was_not_run_and_is_no_damage(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, missing: str, package: str
) -> None:
    def hide() -> None:
        for module in [module for module in sys.modules if module.split(".")[0] in ("awq", missing)]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, missing, None)

    hide()
    found = dsquant.verify(output / name, progress=False)
    assert not found.ok and not found.findings and not found.compared
    (check,) = found.not_checked
    assert check.startswith(name) and f"the package {package} cannot be imported" in check and missing in check
    hide()
    told = CliRunner().invoke(main, ["verify", str(output / name)])
    assert told.exit_code == 5 and "Not checked" in told.stdout
    copy = Path(shutil.copytree(output / name, tmp_path / "copy"))
    file = next(file for file in sorted(copy.iterdir()) if file.suffix in (".safetensors", ".gguf"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert CliRunner().invoke(main, ["verify", str(copy)]).exit_code == 3


def test_a_truncated_shard_names_what_it_lost(output: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(output / "awq", tmp_path / "moved"))
    shard = sorted(copy.glob("*.safetensors"))[1]
    last = list(json.loads((copy / "dsquant.json").read_text())["files"][shard.name]["tensors"])[-1]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    found = dsquant.verify(copy, progress=False).findings
    assert [finding.where for finding in found] == ["size", repr(last)]


def test_another_source_than_the_recorded_one_is_refused(output: Path, nano_r1: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(nano_r1, tmp_path / "other"))
    for shard in other.glob("*.safetensors"):
        content = bytearray(shard.read_bytes())
        for byte in range(len(content) - 4096, len(content)):
            content[byte] ^= 0x80
        shard.write_bytes(content)
    with pytest.raises(InputError, match="not the one that the output was made from"):
        dsquant.verify(output / "awq", source=other, everything=True, progress=False)


@pytest.mark.parametrize("num_bytes", [0, 10, 100])
def test_a_gguf_file_that_ends_in_its_header_is_found(output: Path, tmp_path: Path, num_bytes: int) -> None:
    copy = Path(shutil.copytree(output / "gguf", tmp_path / "copy"))
    path = next(copy.glob("pico*.gguf"))
    path.write_bytes(path.read_bytes()[:num_bytes])
    findings = dsquant.verify(copy, progress=False).findings
    assert findings[0].where == "size" and {finding.file for finding in findings} == {path.name}


@pytest.mark.parametrize("name", ["config.json", "dsquant.json"])
def test_json_that_is_nested_too_deeply_is_found(output: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(output / "awq", tmp_path / "copy"))
    entry = json.loads((copy / "dsquant.json").read_text())["files"]["config.json"]
    (copy / name).write_bytes(b"[" * max(entry["bytes"], 100_000 if name == "dsquant.json" else 0))
    assert {finding.file for finding in dsquant.verify(copy, progress=False).findings} == {name}


def test_a_record_with_a_number_of_5000_digits_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "dsquant.json").write_text('{"a": ' + "9" * 5000 + "}")
    assert [finding.file for finding in dsquant.verify(tmp_path, progress=False).findings] == ["dsquant.json"]


def test_an_output_is_not_read_through_a_link_out_of_it(output: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(output / "awq", tmp_path / "copy"))
    (copy / "config.json").rename(tmp_path / "config.json")
    (copy / "config.json").symlink_to(tmp_path / "config.json")
    found = dsquant.verify(copy, progress=False).findings
    assert any(finding.file == "config.json" and "a link that leads out" in finding.problem for finding in found)
    with pytest.raises(InputError, match=r"config\.json is a link that leads out"):
        dsquant.evaluate(copy, copy, progress=False)


def test_an_interrupted_output_or_a_foreign_folder_is_refused(output: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="output of dsquant"):
        dsquant.verify(tmp_path, progress=False)
    copy = Path(shutil.copytree(output / "awq", tmp_path / "copy"))
    (copy / ".dsquant-work").mkdir()
    assert dsquant.verify(copy, progress=False).ok, "nothing was begun in an empty work folder"
    (copy / ".dsquant-work" / "job.json").touch()
    with pytest.raises(InputError, match="--resume"):
        dsquant.verify(copy, progress=False)


def test_the_command_ends_with_3_on_damage_and_prints_findings(output: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(output / "awq", tmp_path / "copy"))
    whole = CliRunner().invoke(main, ["verify", str(copy), "--json"])
    assert whole.exit_code == 0 and json.loads(whole.stdout)["ok"]
    content = bytearray((copy / "config.json").read_bytes())
    content[-3] ^= 4
    (copy / "config.json").write_bytes(content)
    broken = CliRunner().invoke(main, ["verify", str(copy), "--json"])
    assert broken.exit_code == 3 and json.loads(broken.stdout)["findings"][0]["file"] == "config.json"
    assert "config.json" in CliRunner().invoke(main, ["verify", str(copy)]).stdout
    assert "config.json" in dsquant.verify(copy, progress=False)._repr_html_()


def test_what_is_no_folder_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=f"verify the folder that it is in, {tmp_path}"):
        dsquant.verify(tmp_path / "file", progress=False)
    for path in ("null\0byte", str(tmp_path / "absent")):
        with pytest.raises(InputError, match="is this an output of dsquant"):
            dsquant.verify(path, progress=False)
