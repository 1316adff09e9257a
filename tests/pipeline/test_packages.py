"""What a job needs of other packages at its end is looked up before it reads a weight."""

import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from checkpoints import LLAMA, add_tokenizer, make_dense
from click.testing import CliRunner

import dsquant
from dsquant import packages
from dsquant.cli import main
from dsquant.errors import PackageError
from dsquant.releases.recipe import ReleaseRecipe
from dsquant.releases.release_job import run_recipe
from dsquant.source.shards import ShardIndex

NOT_INSTALLED = ("dsquant", "autoawq", "compressed-tensors", "gguf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense checkpoint; tests leave it as it is."""
    return add_tokenizer(make_dense(tmp_path_factory.mktemp("packages") / "llama", LLAMA))


@pytest.fixture
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(ShardIndex, "read", read)


@pytest.fixture
def without_metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where dsquant and some others run from folders that were never installed."""
    found = metadata.version

    def not_found(name: str) -> str:
        if name in NOT_INSTALLED:
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "version", not_found)
    packages.version.cache_clear()
    yield
    packages.version.cache_clear()


def hide(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] in ("awq", missing)]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)


def test_a_package_without_metadata_is_recorded_as_unknown(llama: Path, tmp_path: Path, without_metadata: None) -> None:
    dsquant.gguf(llama, type="Q8_0", output=tmp_path / "out", calibration="none", evaluate=False, progress=False)
    record = json.loads((tmp_path / "out" / "dsquant.json").read_text())
    assert {name for name, found in record["versions"].items() if found == "unknown"} == set(NOT_INSTALLED)
    assert dsquant.verify(tmp_path / "out", progress=False).ok


def test_a_version_is_the_one_that_the_job_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    before = packages.version("torch")
    monkeypatch.setattr(metadata, "version", lambda name: "another")
    assert packages.version("torch") == before


@pytest.mark.parametrize(("to", "missing"), [
    ("awq", "datasets"), ("compressed-tensors", "compressed_tensors"), ("gguf:Q8_0", "gguf"),
])  # fmt: skip
def test_a_job_hears_at_once_that_its_output_could_not_be_evaluated(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weight_is_read: None, to: str, missing: str
) -> None:
    hide(monkeypatch, missing)
    command = ["awq", str(llama), "--to", to, "--output", str(tmp_path / "out"), "--group-size", "64"]
    ended = CliRunner().invoke(main, [*command, "--samples", "1", "--seq-len", "32", "--calibration", __file__])
    assert ended.exit_code == 3 and missing in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


def test_only_the_format_awq_needs_autoawq(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "awq")
    options = {"calibration": __file__, "samples": 1, "seq_len": 32, "group_size": 64, "steps": "none"}
    out = dsquant.awq(
        llama, output=tmp_path / "out", to="compressed-tensors", evaluate=False, progress=False, **options
    )
    small = {"texts": [__file__], "samples": 1, "seq_len": 32, "prompts": "none", "progress": False}
    assert dsquant.evaluate(llama, out.output, **small).candidates


@pytest.mark.parametrize("missing", ["jinja2", "sacrebleu"])
def test_an_evaluation_hears_at_once_that_it_could_not_be_reported(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weight_is_read: None, missing: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def f():\\n"}\n')
    hide(monkeypatch, missing)
    with pytest.raises(PackageError, match=missing):
        dsquant.evaluate(
            llama, llama, texts=[__file__], samples=1, seq_len=32, prompts=prompts, max_tokens=1,
            output=tmp_path / "report", progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("missing", ["jinja2", "datasets"])
def test_a_run_hears_at_once_that_its_evaluation_could_not_be_made(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weight_is_read: None, missing: str
) -> None:
    recipe = ReleaseRecipe.model_validate({
        "model": str(llama),
        "output": str(tmp_path / "out"),
        "calibration": {"texts": [__file__], "samples": 1, "seq_len": 32},
        "quantize": [{"name": "q", "to": ["awq"], "group_size": 64}],
        "evaluate": {"texts": [__file__], "samples": 1, "seq_len": 32},
    })  # fmt: skip
    hide(monkeypatch, missing)
    with pytest.raises(PackageError, match=missing):
        run_recipe(recipe)
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_broken_is_not_the_checkpoints_fault(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weight_is_read: None
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == "gguf"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "gguf", None)
    arguments = ["gguf", str(llama), "--type", "F32", "--output", str(tmp_path / "out"), "--no-evaluate"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 3 and "gguf" in result.output and "config.json" not in result.output
    assert not (tmp_path / "out").exists()
