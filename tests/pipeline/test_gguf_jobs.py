"""Conversions to GGUF as jobs: interrupted, resumed, calibrated, refused."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import add_tokenizer, make_pico_r1
from gguf_files import CALIBRATED, LARGEST_ERROR, PLAIN, decoded, expected, tensors_of
from safetensors.torch import load_file, save_file
from shapes import NARROW, SMALLEST

import dsquant
from dsquant.errors import InputError, Interrupted, UsageError
from dsquant.formats.gguf import store
from dsquant.recipes import Recipe, gguf_recipe


class _StopAfter:
    """Stops a job at its n-th report."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, _: Any) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Interrupted("the test stopped it")


@pytest.mark.parametrize("scales", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_interrupted_conversion_resumes_to_the_same_bytes(
    narrow_r1: Path, text_file: Path, tmp_path: Path, scales: bool
) -> None:
    from dsquant.pipeline import job as pipeline

    def recipe(output: str) -> Recipe:
        return Recipe.checked(
            model=str(narrow_r1), to="gguf:Q4_K_M", output=tmp_path / output, calibration=(str(text_file),), mtp="drop",
            preset="compact", steps="scales" if scales else "none", samples=6, seq_len=32, evaluate=False,
            split_max_bytes=100_000,
        )  # fmt: skip

    pipeline.run_job(recipe("whole"))
    steps, stops = 6, 0
    while True:
        try:
            pipeline.run_job(recipe("parts"), resume=True, report=_StopAfter(steps))
            break
        except Interrupted:
            stops += 1
            steps = 12 + stops  # a layer has about as many reports
            finished, unfinished = (list((tmp_path / "parts").glob(ending)) for ending in ("*.gguf", "*.partial"))
            assert not (finished and unfinished), "nothing unfinished may bear its final name"
    assert 2 <= stops < 30

    def hashes(folder: Path) -> dict[str, str]:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}

    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_scales_lower_the_drift_where_channels_have_outliers(text_file: Path, tmp_path: Path) -> None:
    model = add_tokenizer(make_pico_r1(tmp_path / "model", outliers=True, **NARROW))
    errors = {}
    for scales in (True, False):
        out = tmp_path / str(scales)
        options = CALIBRATED | {"samples": 32}
        dsquant.gguf(model, type="Q4_0", output=out, calibration=str(text_file), scales=scales, **options)
        evaluation = dsquant.evaluate(
            model, out, texts=[text_file], seq_len=64, samples=4, prompts="none", progress=False
        )
        errors[scales] = evaluation.candidates[0].texts["text.txt"].mean_kl.estimate
    assert errors[True] < errors[False] / 2


def test_awq_and_gguf_come_from_one_calibration(narrow_r1: Path, text_file: Path, tmp_path: Path) -> None:
    options = CALIBRATED | {"steps": "scales", "calibration": (str(text_file),), "preset": "compact", "mtp": "drop"}
    result = dsquant.awq(narrow_r1, output=tmp_path / "out", to=["awq", "gguf:Q4_K_M"], group_size=64, **options)
    assert result.folders["gguf:Q4_K_M"] == tmp_path / "out" / "gguf" / "pico-r1-Q4_K_M.gguf"
    assert result.folders["gguf:Q4_K_M"].is_file() and (tmp_path / "out" / "gguf" / "imatrix.gguf").is_file()
    alone = dsquant.awq(narrow_r1, output=tmp_path / "awq", to="awq", group_size=64, **options)
    for file in alone.folders["awq"].glob("*.safetensors"):
        assert file.read_bytes() == (result.folders["awq"] / file.name).read_bytes()
    alone = dsquant.awq(narrow_r1, output=tmp_path / "gguf", to="gguf:Q4_K_M", **options)
    assert alone.folders["gguf:Q4_K_M"].read_bytes() == result.folders["gguf:Q4_K_M"].read_bytes()


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_two_types_of_gguf_beside_awq_are_those_of_jobs_of_their_own(
    narrow_r1: Path, text_file: Path, tmp_path: Path, device: str
) -> None:
    steps = "scales,compensate"
    options = {**CALIBRATED, "calibration": (str(text_file),), "device": device, "preset": "compact", "steps": steps}
    result = dsquant.awq(
        narrow_r1, output=tmp_path / "out", to=["awq", "gguf:Q5_0", "gguf:Q8_0"], group_size=64, mtp="drop",
        **options | {"evaluate": True},
    )  # fmt: skip
    assert set(result.divergence) == {"awq", "gguf:Q5_0", "gguf:Q8_0"}
    assert not dsquant.verify(tmp_path / "out", progress=False).findings
    record = json.loads((tmp_path / "out" / "dsquant.json").read_text())
    rounded = record["outputs"]["gguf:Q5_0"]["weight_errors"]
    assert "model.layers.1.mlp.experts.0.up_proj" in rounded and "model.layers.0.self_attn.kv_b_proj.weight" in rounded
    assert all(grid["mlp_error"] < grid["mlp_error_plain"] for grid in record["layers"][0]["grids"])
    for type_name in ("Q5_0", "Q8_0"):
        alone = dsquant.awq(narrow_r1, output=tmp_path / type_name, to=f"gguf:{type_name}", mtp="drop", **options)
        beside, own = (found.folders[f"gguf:{type_name}"] for found in (result, alone))
        assert beside.parent.name == f"gguf-{type_name}" and beside.read_bytes() == own.read_bytes()


# --- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type": "Q9_K"}, "Q9_K.*unknown"),
        ({"type": "Q4_K_M", "tensor_types": ["attn"]}, "REGEX=TYPE"),
        ({"type": "Q4_K_M", "tensor_types": ["attn=Q7"]}, "REGEX=TYPE"),
        ({"type": "Q4_K_M", "tensor_types": ["(=Q8_0"]}, "no regular expression"),
    ],
)
def test_wrong_usage_is_refused(nano_r1: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        dsquant.gguf(nano_r1, output=tmp_path / "out", **options, **PLAIN)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    model = add_tokenizer(make_pico_r1(tmp_path / "model", **SMALLEST))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False}],
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"tokenizer\.json.*pre-tokenizer is none of"):
        dsquant.gguf(model, type="Q8_0", output=tmp_path / "out", **PLAIN)


def test_without_ggml_dsquants_own_code_quantizes_to_every_type_and_says_so(
    nano_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.ggml, "library", lambda: None)
    result = dsquant.gguf(nano_r1, type="Q8_0", output=tmp_path / "q8", **PLAIN)
    assert json.loads((tmp_path / "q8" / "dsquant.json").read_text())["quantizer"] == "PyTorch"
    assert any("PyTorch code makes Q8_0, more slowly" in warning for warning in result.warnings)
    wanted = expected(nano_r1, 2)
    for type_name in ("Q4_K_M", "IQ4_XS"):
        dsquant.gguf(nano_r1, type=type_name, output=tmp_path / type_name, **PLAIN)
        for name, tensor in tensors_of(tmp_path / type_name).items():
            limit = 2 * LARGEST_ERROR[tensor.tensor_type.name]
            assert float((decoded(tensor) - wanted[name]).norm()) <= limit * float(wanted[name].norm()), name


def test_a_job_that_was_killed_while_its_files_got_their_names_resumes(nano_r1: Path, tmp_path: Path) -> None:
    from dsquant.pipeline import job as pipeline
    from dsquant.reporting.progress import Progress

    out = tmp_path / "out"
    options = {"calibration": (), "evaluate": False, "split_max_bytes": 200_000}
    recipe = gguf_recipe(model=str(nano_r1), type="Q4_K_M", output=out, **options)

    def stop_at_the_end(progress: Progress) -> None:
        if progress.stage == "quantize" and progress.done == progress.total:
            raise Interrupted("the test stopped it")

    with pytest.raises(Interrupted):
        pipeline.run_job(recipe, report=stop_at_the_end)
    files = sorted(out.glob("*.partial"))
    assert len(files) > 2
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    for file in files[1:]:
        file.rename(file.with_suffix(""))
    pipeline.run_job(recipe, resume=True)
    assert [hashlib.sha256(file.with_suffix("").read_bytes()).hexdigest() for file in files] == hashes
    assert (out / "dsquant.json").is_file() and not list(out.glob("*.partial"))


def test_a_job_is_not_resumed_with_another_quantizer(
    nano_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsquant.pipeline import job as pipeline

    recipe = gguf_recipe(model=str(nano_r1), type="Q8_0", output=tmp_path / "out", calibration=(), evaluate=False)
    with pytest.raises(Interrupted):
        pipeline.run_job(recipe, report=_StopAfter(10))
    monkeypatch.setattr(store.ggml, "library", lambda: None)
    with pytest.raises(UsageError, match=r"quantizer ggml .*here is PyTorch"):
        pipeline.run_job(recipe, resume=True)
    monkeypatch.undo()
    pipeline.run_job(recipe, resume=True)


def test_a_gpu_that_is_not_there_is_refused(nano_r1: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(UsageError, match="finds no GPU"):
        dsquant.gguf(nano_r1, type="Q8_0", output=tmp_path / "out", device="cuda", **PLAIN)


def test_a_job_that_met_a_damaged_tensor_goes_on_where_its_file_is_replaced(nano_r1: Path, tmp_path: Path) -> None:
    def convert(output: str, **options: Any) -> dict[str, str]:
        dsquant.gguf(tmp_path / "model", output=tmp_path / output, type="Q8_0", **PLAIN, **options)
        found = json.loads((tmp_path / output / "dsquant.json").read_text())
        return {name: entry["sha256"] for name, entry in found["files"].items() if name.endswith(".gguf")}

    shutil.copytree(nano_r1, tmp_path / "model")
    expected = convert("whole")
    path = next(path for path in (tmp_path / "model").glob("*.safetensors") if "model.norm.weight" in load_file(path))
    good, tensors = path.read_bytes(), load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"'model\.norm\.weight' holds NaN.*finished units stay"):
        convert("parts")
    path.write_bytes(good)
    assert convert("parts", resume=True) == expected
