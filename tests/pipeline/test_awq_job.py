"""The whole job on small checkpoints: outputs, presets, resume after kills, determinism, refusals."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from checkpoints import LLAMA, QWEN2, add_tokenizer, full_model, make_dense, make_pico_r1
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from shapes import NARROW
from small_jobs import FAST, arguments, contents

import dsquant
from dsquant.cli import main
from dsquant.errors import InputError, Interrupted, UsageError
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.source.shards import read_index

DSQUANT = [sys.executable, "-m", "dsquant.cli"]

pytestmark = pytest.mark.usefixtures("imported")


def test_one_calibration_writes_two_formats_that_their_packages_read(
    nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    result = dsquant.awq(
        nano_r1, output=tmp_path / "out", to=["awq", "compressed-tensors"], preset="compact",
        calibration=(str(text_file),), **FAST,
    )  # fmt: skip
    original = open_checkpoint(nano_r1).weights
    for folder in result.folders.values():
        weights = open_checkpoint(folder).weights
        assert set(weights) == set(original)
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
        assert 0 < float((weights[name] - original[name]).norm() / original[name].norm()) < 1
        assert result.output_bytes[folder.name] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        record = json.loads((folder / "dsquant.json").read_text())
        assert set(record["source"]["tensors_sha256"]) == set(open_checkpoint(nano_r1).index)
        assert record["layers"][1]["tokens_per_expert"] and sum(record["layers"][1]["tokens_per_expert"]) == 6 * 32 * 2
        assert not (folder / ".dsquant-work").exists()


@pytest.mark.slow
def test_the_quantized_model_is_nearer_to_the_original_than_plain_rounding(text_file: Path, tmp_path: Path) -> None:
    model = add_tokenizer(make_pico_r1(tmp_path / "model", outliers=True, **NARROW))
    dsquant.awq(
        model, output=tmp_path / "out", to="compressed-tensors", preset="compact",
        calibration=(str(text_file),), **FAST | {"samples": 32, "steps": None},
    )  # fmt: skip
    weights = open_checkpoint(model).weights
    tokens = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(5))
    record = json.loads((tmp_path / "out" / "dsquant.json").read_text())
    for layer in record["layers"]:
        (errors,) = layer["grids"]
        assert errors["mlp_error"] < errors["mlp_error_plain"] / 5
        assert errors["attention_error"] < errors["attention_error_plain"] / 5
    with torch.no_grad():
        wanted = full_model(model, weights)(tokens).logits
        found = full_model(model, open_checkpoint(tmp_path / "out").weights)(tokens).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1.0


@pytest.mark.parametrize("mtp", ["keep", "quantize", "drop"])
def test_the_mtp_layer_is_kept_quantized_or_dropped_as_asked(
    nano_r1: Path, text_file: Path, tmp_path: Path, mtp: str
) -> None:
    result = dsquant.awq(nano_r1, output=tmp_path / "out", to="awq", mtp=mtp, calibration=(str(text_file),), **FAST)
    index = open_checkpoint(tmp_path / "out").index
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = f"model.layers.2.mlp.experts.0.up_proj.{'qweight' if mtp == 'quantize' else 'weight'}"
    assert (kept in index) == (mtp != "drop")
    assert config["num_nextn_predict_layers"] == (0 if mtp == "drop" else 1)
    assert any("multi-token" in warning for warning in result.warnings) == (mtp == "drop")
    if mtp == "keep":
        assert "model.layers.2.mlp" in config["quantization_config"]["modules_to_not_convert"]


def test_the_quality_preset_leaves_attention_and_shared_experts_in_bf16(
    nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    dsquant.awq(nano_r1, output=tmp_path / "out", to="awq", calibration=(str(text_file),), **FAST)
    index = open_checkpoint(tmp_path / "out").index
    quantized = {name.removesuffix(".qweight") for name in index if name.endswith(".qweight")}
    assert len(quantized) == 4 * 3 and all(".mlp.experts." in name for name in quantized)
    assert index["model.layers.1.self_attn.o_proj.weight"].dtype == "BF16"
    assert index["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == "F32"


def test_a_dense_model_has_every_linear_quantized(text_file: Path, tmp_path: Path) -> None:
    model = add_tokenizer(make_dense(tmp_path / "model", QWEN2), vocabulary=290)
    dsquant.awq(model, output=tmp_path / "out", calibration=(str(text_file),), **FAST)
    index = open_checkpoint(tmp_path / "out").index
    assert sum(name.endswith(".qweight") for name in index) == 2 * 7
    assert "model.layers.0.self_attn.v_proj.bias" in index


def test_two_runs_write_identical_bytes(narrow_r1: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        dsquant.awq(narrow_r1, output=tmp_path / name, calibration=(str(text_file),), **FAST | {"steps": None})
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("kills", [pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_the_output_is_the_uninterrupted_one(
    nano_r1: Path, text_file: Path, tmp_path: Path, kills: int
) -> None:
    more = ("--preset", "compact")
    started = time.monotonic()
    command = [*DSQUANT, *arguments(nano_r1, text_file, tmp_path / "whole", *more)]
    subprocess.run(command, check=True, capture_output=True)
    duration = time.monotonic() - started
    output = tmp_path / "killed"
    moments = random.Random(kills)
    for _ in range(kills):
        process = subprocess.Popen(
            [*DSQUANT, *arguments(nano_r1, text_file, output, *more, "--resume")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(duration * moments.uniform(0.3, 0.95))
        process.kill()
        process.wait()
        if (output / ".dsquant-work").exists():
            assert not (output / "model.safetensors.index.json").exists() or not (output / "dsquant.json").exists()
    forked.finish(*arguments(nano_r1, text_file, output, *more, "--resume"))
    assert contents(output) == contents(tmp_path / "whole")


def test_sigterm_stops_at_a_safe_point_with_exit_code_75(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    command = arguments(nano_r1, text_file, tmp_path / "out")
    process = forked.start(*command)
    while process.poll() is None and not (tmp_path / "out" / ".dsquant-work" / "job.json").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "--resume" in errors
    forked.finish(*command, "--resume")


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
@pytest.mark.parametrize(("call", "fails"), [("formats.output_shards.os.fsync", 12), ("pipeline.units.sync_file", 2)])
def test_a_full_disk_stops_the_job_and_loses_nothing(
    call: str, fails: int, nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    dsquant.awq(nano_r1, output=tmp_path / "whole", calibration=(str(text_file),), **FAST)
    full = pytest.MonkeyPatch()
    written = 0

    def no_space(_: Any) -> None:
        nonlocal written
        written += 1
        if written == fails:
            raise OSError(28, "No space left on device")

    full.setattr(f"dsquant.{call}", no_space)
    with pytest.raises(Interrupted, match="disk is full"):
        dsquant.awq(nano_r1, output=tmp_path / "out", calibration=(str(text_file),), **FAST)
    full.undo()
    dsquant.awq(nano_r1, output=tmp_path / "out", resume=True, calibration=(str(text_file),), **FAST)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limits on file sizes here")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # gguf-py leaves its file to be closed
@pytest.mark.parametrize(
    "limit", [pytest.param(2_000, marks=pytest.mark.slow), 20_000, pytest.param(200_000, marks=pytest.mark.slow)]
)
def test_a_limit_on_file_sizes_is_a_full_disk(limit: int, nano_r1: Path, tmp_path: Path) -> None:
    import resource

    convert = partial(dsquant.gguf, nano_r1, type="Q8_0", calibration=(), evaluate=False, progress=False)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        with pytest.raises(Interrupted, match=r"limit on file sizes.*(dsquant-|job\.json|gguf)"):
            convert(output=tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    convert(output=tmp_path / "out", resume=True)
    convert(output=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_file_that_cannot_be_written_ends_with_3_and_its_name(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    command = arguments(nano_r1, text_file, tmp_path / "out", "--metrics-file", "/proc/out.prom")
    process = CliRunner().invoke(main, command)
    assert process.exit_code == 3 and "Traceback" not in process.stderr
    assert "dsquant: /proc/out.prom" in process.stderr


def test_a_layer_that_loses_most_of_its_output_is_told_of(text_file: Path, tmp_path: Path) -> None:
    model = add_tokenizer(make_dense(tmp_path / "model", LLAMA), vocabulary=290)
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():  # the function stays, but no scale of a group is so small
            factor = 1e5 if "layernorm" in name else 1e-5 if re.search("[qkv]_proj|gate_proj|up_proj", name) else 1
            tensors[name] = tensor * factor
        save_file(tensors, path, {"format": "pt"})
    result = dsquant.awq(model, output=tmp_path / "out", calibration=str(text_file), **FAST)
    assert any("2 layers lost more than 25% of their output's energy" in words for words in result.warnings)


def test_a_source_that_changed_under_an_interrupted_job_is_refused(
    nano_r1: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(nano_r1, model)
    options = {"output": tmp_path / "out", "calibration": (str(text_file),), **FAST}

    def stop(*arguments: Any) -> None:
        raise Interrupted("here")

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("dsquant.pipeline.units._run_layer", stop)
        dsquant.awq(model, **options)
    for path in model.glob("*.safetensors"):
        os.utime(path)  # copied again, same content: goes on after hashing
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("dsquant.pipeline.units._run_layer", stop)
        dsquant.awq(model, resume=True, **options)
    stored = read_index(model)["model.embed_tokens.weight"]  # of the unit that is finished
    content = bytearray(stored.path.read_bytes())
    content[stored.start] ^= 1
    stored.path.write_bytes(content)
    with pytest.raises(InputError, match="not what it was"):
        dsquant.awq(model, resume=True, **options)


def test_a_finished_output_is_left_alone_by_resume_and_refused_without(
    nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {"output": tmp_path / "out", "calibration": (str(text_file),), **FAST}
    dsquant.awq(nano_r1, **options)
    before = contents(tmp_path / "out")
    assert dsquant.awq(nano_r1, resume=True, **options).already_finished
    with pytest.raises(InputError, match="finished output; start over with --restart"):
        dsquant.awq(nano_r1, **options)
    with pytest.raises(UsageError, match="seed was 0, is 1"):
        dsquant.awq(nano_r1, resume=True, seed=1, **options)
    assert contents(tmp_path / "out") == before
    dsquant.awq(nano_r1, restart=True, seed=1, **options)
    assert contents(tmp_path / "out") != before


def test_a_default_spelled_out_and_another_evaluation_are_the_same_job(
    nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {**FAST, "calibration": text_file, "output": tmp_path / "out", "resume": True}
    spelled_out = {"preset": "quality", "symmetric": True, "to": "compressed-tensors", "rest": "fp8"}
    assert not dsquant.awq(nano_r1, **options).already_finished
    assert dsquant.awq(nano_r1, **options, **spelled_out).already_finished
    assert dsquant.awq(nano_r1, **options | {"evaluate": True}).already_finished
    with pytest.raises(dsquant.UsageError, match="preset was 'quality', is 'compact'"):
        dsquant.awq(nano_r1, **options | {"preset": "compact"})


def test_a_second_run_on_the_same_folder_is_refused_and_harms_nothing(
    nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    command = arguments(nano_r1, text_file, tmp_path / "out")
    first = forked.start(*command)
    while first.poll() is None and not (tmp_path / "out" / ".dsquant-work" / "job.json").exists():
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    second = CliRunner().invoke(main, [*command, "--restart"])
    first.send_signal(signal.SIGCONT)
    assert second.exit_code == 3 and "another dsquant run" in second.stderr
    assert first.wait(timeout=120) == 0
    assert open_checkpoint(tmp_path / "out").index


def test_restart_removes_nothing_that_is_not_the_jobs_own(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    options = {"output": tmp_path / "out", "calibration": (str(text_file),), **FAST}
    dsquant.awq(nano_r1, **options)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    dsquant.awq(nano_r1, restart=True, **options)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_budget_that_cannot_work_is_refused_with_the_number(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"need [0-9.]+ [MG]iB"):
        dsquant.awq(nano_r1, output=tmp_path / "out", memory_budget="100MiB", calibration=(str(text_file),), **FAST)
    assert not (tmp_path / "out").exists()


def test_a_short_text_is_reported_and_never_repeated(nano_r1: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("for number in range(10):\n    total += number\n" * 8)
    result = dsquant.awq(nano_r1, output=tmp_path / "out", calibration=(str(text),), **{**FAST, "samples": 500})
    assert any("500 were asked for" in warning for warning in result.warnings)


def test_a_quantized_model_is_not_quantized_again(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    dsquant.awq(nano_r1, output=tmp_path / "out", calibration=(str(text_file),), **FAST)
    with pytest.raises(InputError, match="already quantized"):
        dsquant.awq(tmp_path / "out", output=tmp_path / "again", calibration=(str(text_file),), **FAST)
