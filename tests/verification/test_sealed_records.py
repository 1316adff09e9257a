"""Records that are sealed and yet wrong: none that dsquant did not write is believed, and what they hide is found."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outputs import OUTPUTS, place_of, reseal

import dsquant
from dsquant.errors import InputError, UsageError
from dsquant.files.sealing import seal


def test_a_shard_whose_hash_was_renewed_but_not_its_tensors_is_found(output: Path, tmp_path: Path) -> None:
    for name in OUTPUTS:
        copy = Path(shutil.copytree(output / name, tmp_path / name))
        files = json.loads((copy / "dsquant.json").read_text())["files"]
        file, entry = next((file, entry) for file, entry in files.items() if "tensors" in entry)
        last = list(entry["tensors"])[-1]
        content = bytearray((copy / file).read_bytes())
        content[place_of(copy / file, last)[0]] ^= 1
        (copy / file).write_bytes(content)
        reseal(copy, lambda record: None)
        found = dsquant.verify(copy, progress=False).findings
        assert [(finding.file, finding.where) for finding in found] == [(file, repr(last))]


def test_a_folders_record_that_tells_otherwise_than_the_outputs_is_found(output: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(output, tmp_path / "copy"))
    reseal(copy / "awq", lambda record: record["warnings"].append("all is well"))
    reseal(copy, lambda record: None)
    (finding,) = dsquant.verify(copy, progress=False).findings
    assert finding.file == "awq/dsquant.json" and "differs from what" in finding.problem


@pytest.mark.parametrize(("change", "where"), [
    (lambda record: record["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}), "passwd"),
    (lambda record: record["files"].update({"a\0b": {"bytes": 1, "sha256": "0" * 64}}), "files"),
    (lambda record: record["files"].update({"config.json": 7}), "config.json"),
    (lambda record: record["files"]["model-00001-of-00006.safetensors"].pop("tensors"), "holds no tensors"),
    (lambda record: record.update(outputs={}), "outputs"),
    (lambda record: record.update(recipe=[]), "recipe"),
    (lambda record: record["outputs"]["awq"].update(folder="/"), "folder"),
    (lambda record: record["source"]["tensors_sha256"].update({"lm_head.weight": None}), "lm_head.weight"),
    (lambda record: next(entry for entry in record["files"].values() if "tensors" in entry)["tensors"].update(x=["?"]),
     "'x'"),
])  # fmt: skip
def test_a_sealed_record_that_no_dsquant_wrote_is_refused(
    output: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], where: str
) -> None:
    record = json.loads((output / "awq" / "dsquant.json").read_text())
    first = next(name for name in record["files"] if name.endswith(".safetensors"))
    record["files"]["model-00001-of-00006.safetensors"] = record["files"][first]
    change(record)
    del record["sections_sha256"]
    (tmp_path / "dsquant.json").write_bytes(seal(record))
    with pytest.raises(InputError, match=rf"dsquant\.json is not a record of dsquant: .*{re.escape(where)}"):
        dsquant.verify(tmp_path, progress=False)


def test_an_output_without_its_source_is_verified_as_far_as_it_goes(
    output: Path, nano_r1: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(output / "awq", tmp_path / "moved"))
    reseal(copy, lambda record: record["recipe"].update(model="/no/such/model"))
    found = dsquant.verify(copy, progress=False)
    assert found.ok and not found.compared and "--source" in found.notes[0]
    assert dsquant.verify(copy, source=nano_r1, progress=False).compared
    with pytest.raises(UsageError, match="--source"):
        dsquant.verify(copy, everything=True, progress=False)


def test_a_tensor_that_the_source_has_and_the_output_not_is_found(output: Path, tmp_path: Path) -> None:
    for name in ("awq", "gguf"):
        copy = Path(shutil.copytree(output / name, tmp_path / name))
        more = {"model.layers.1.mlp.experts.99.up_proj.weight": "0" * 64}
        reseal(copy, lambda record, more=more: record["source"]["tensors_sha256"].update(more))
        found = dsquant.verify(copy, progress=False).findings
        assert [finding.where for finding in found] == ["'model.layers.1.mlp.experts.99.up_proj.weight'"]


@pytest.mark.parametrize(("name", "tensor"), [
    ("awq", "model.layers.1.mlp.experts.3.down_proj.qweight"),
    ("compressed-tensors", "model.layers.1.mlp.experts.3.down_proj.weight_packed"),
    ("gguf", "blk.1.ffn_down_shexp.weight"),
])  # fmt: skip
def test_values_that_are_not_the_sources_are_found_although_all_hashes_match(
    output: Path, tmp_path: Path, name: str, tensor: str
) -> None:
    copy = Path(shutil.copytree(output / name, tmp_path / name))
    files = json.loads((copy / "dsquant.json").read_text())["files"]
    file = next(file for file, entry in files.items() if tensor in entry.get("tensors", {}))
    content = bytearray((copy / file).read_bytes())
    start, size = place_of(copy / file, tensor)
    for byte in range(start, start + size):
        content[byte] ^= 0x11
    (copy / file).write_bytes(content)
    wrong = hashlib.sha256(content[start : start + size]).hexdigest()

    def change(record: dict[str, Any]) -> None:
        record["files"][file]["tensors"][tensor][1] = wrong

    reseal(copy, change)
    (finding,) = dsquant.verify(copy, everything=True, progress=False).findings
    assert "recorded" in finding.problem and finding.file == file
    assert finding.where.strip("'").endswith("down_proj.weight")


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a file outside": lambda record: record["files"].update({"../victim": {"bytes": 1, "sha256": ""}}),
    "a null byte": lambda record: record["files"].update({"a\0": {"bytes": 1, "sha256": ""}}),
    "a file without a size": lambda record: record["files"]["config.json"].pop("bytes"),
    "a file that is a number": lambda record: record["files"].update({"config.json": 7}),
    "an unknown type": lambda record: record["files"]["config.json"].update(tensors={"a": ["F4", "", 1]}),
    "an extent that is text": lambda record: record["files"]["config.json"].update(tensors={"a": ["F32", "", "1"]}),
    "files that are a list": lambda record: record.update(files=["config.json"]),
    "no outputs": lambda record: record.update(outputs={}),
    "an output outside": lambda record: next(iter(record["outputs"].values())).update(folder="../elsewhere"),
    "no source": lambda record: record.pop("source"),
    "a model that is a number": lambda record: record["recipe"].update(model=7),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_record_that_seals_what_dsquant_never_writes_is_refused(kind: str, output: Path, tmp_path: Path) -> None:
    record = json.loads((output / "awq" / "dsquant.json").read_text())
    del record["sections_sha256"]
    FORGED[kind](record)
    (tmp_path / "dsquant.json").write_bytes(seal(record))
    with pytest.raises(InputError, match=r"dsquant\.json is not a record of dsquant"):
        dsquant.verify(tmp_path, progress=False)
