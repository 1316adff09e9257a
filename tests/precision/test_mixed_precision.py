"""Widths chosen by measured sensitivity: targets are met, readers load the result, a resumed job makes its bytes."""

import json
import re
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from checkpoints import QWEN2, add_tokenizer, full_model, make_dense, make_pico_r1
from safetensors.torch import load_file
from shapes import NARROW
from small_jobs import FAST, arguments, contents

import dsquant
from benchmarks.peers.decoding import decode_compressed_tensors, stored_bits
from dsquant.errors import Interrupted, UsageError
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.formats.skip_lists import skipped_modules, targets_by_width
from dsquant.pipeline.inputs import open_model
from dsquant.pipeline.planning import plan_run
from dsquant.recipes import Recipe

COMPACT: dict[str, Any] = {**FAST, "preset": "compact"}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow R1 of three layers whose channels differ."""
    folder = tmp_path_factory.mktemp("uneven") / "model"
    return add_tokenizer(make_pico_r1(folder, outliers=True, **NARROW | {"num_hidden_layers": 3}))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2."""
    return add_tokenizer(make_dense(tmp_path_factory.mktemp("dense") / "model", QWEN2), vocabulary=290)


@pytest.fixture(scope="module")
def mixed(uneven: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It with 5.5 bits a weight."""
    output = tmp_path_factory.mktemp("mixed") / "out"
    dsquant.awq(
        uneven, output=output, to="compressed-tensors", target_bits=5.5, calibration=(str(text_file),),
        kv_b="quantize", rest="bf16", **COMPACT,
    )  # fmt: skip
    return output


def test_the_target_is_met_and_told(mixed: Path) -> None:
    assert 5.0 < stored_bits(mixed) <= 5.5
    record = json.loads((mixed / "dsquant.json").read_text())
    widths = {entry["width"] for entry in record["precision"].values()}
    assert {4, 8} <= widths <= {4, 8, 16}
    card = (mixed / "README.md").read_text()
    assert "| group | stored as | layers | size | of the error |" in card and "| mlp.experts |" in card


def test_what_engines_fuse_has_one_width_and_each_group_names_its_linears(mixed: Path) -> None:
    quantization = json.loads((mixed / "config.json").read_text())["quantization_config"]
    groups = quantization["config_groups"].values()

    def bits(module: str) -> list[int]:
        named = [group for group in groups if any(re.match(target[3:], module) for target in group["targets"])]
        return [group["weights"]["num_bits"] for group in named]

    index = open_checkpoint(mixed).index
    packed = {name.removesuffix(".weight_packed") for name in index if name.endswith(".weight_packed")}
    for module in packed:
        assert len(bits(module)) == 1, module
        assert module not in quantization["ignore"]
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        fused = [[f"{prefix}self_attn.{name}" for name in ("q_a_proj", "kv_a_proj_with_mqa")]]
        fused.append([name for name in packed if name.startswith(f"{prefix}mlp.experts.")])
        for names in fused:
            assert len({tuple(bits(name)) for name in names}) <= 1


def test_compressed_tensors_own_matching_decodes_what_dsquant_reads(mixed: Path) -> None:
    stored = {name: tensor for path in mixed.glob("*.safetensors") for name, tensor in load_file(path).items()}
    config = json.loads((mixed / "config.json").read_text())["quantization_config"]
    theirs, ours = decode_compressed_tensors(stored, config), open_checkpoint(mixed).weights
    assert set(theirs) == set(ours)
    for name, values in theirs.items():
        assert float((ours[name] - values).abs().max()) <= 2**-8 * float(values.abs().max()), name
    assert not dsquant.verify(mixed).findings
    assert dsquant.inspect(mixed)


def test_transformers_runs_a_dense_model_of_several_widths(dense: Path, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = dsquant.awq(
        dense, output=tmp_path / "out", to="compressed-tensors", target_bits=6.5, calibration=(str(text_file),),
        symmetric=True, **FAST,
    )  # fmt: skip
    assert {4, 8} <= {entry["width"] for entry in result.precision.values()}
    tokens = torch.randint(0, 290, (2, 24), generator=torch.Generator().manual_seed(5))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(tokens).logits
        wanted = full_model(tmp_path / "out", open_checkpoint(tmp_path / "out").weights)(tokens).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.slow
def test_more_bits_bring_the_model_nearer(dense: Path, text_file: Path, tmp_path: Path) -> None:
    tokens = torch.randint(0, 290, (2, 48), generator=torch.Generator().manual_seed(5))
    errors = []
    for bits in (3.5, 5.0, 8.0):
        folder = tmp_path / str(bits)
        dsquant.awq(
            dense, output=folder, to="compressed-tensors", target_bits=bits, calibration=(str(text_file),), **FAST
        )
        with torch.no_grad():
            wanted = full_model(dense, open_checkpoint(dense).weights)(tokens).logits
            found = full_model(dense, open_checkpoint(folder).weights)(tokens).logits
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
def test_awq_leaves_groups_unquantized_for_a_size(uneven: Path, text_file: Path, tmp_path: Path) -> None:
    options = {**COMPACT, "to": "awq", "calibration": (str(text_file),), "samples": 2}
    whole = dsquant.awq(uneven, output=tmp_path / "whole", **options).output_bytes["awq"]
    result = dsquant.awq(uneven, output=tmp_path / "out", target_size=int(1.3 * whole), **options)
    opened = open_checkpoint(tmp_path / "out")
    assert whole < opened.index.num_bytes <= 1.3 * whole
    assert {entry["width"] for entry in result.precision.values()} == {4, 16}
    skipped = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for name in opened.index:
        if name.endswith(".qweight"):
            assert not any(entry in name for entry in skipped["modules_to_not_convert"]), name
    tokens = torch.randint(0, 290, (2, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = full_model(uneven, open_checkpoint(uneven).weights)(tokens).logits
        found, uniform = (full_model(uneven, open_checkpoint(tmp_path / name).weights)(tokens).logits
                          for name in ("out", "whole"))  # fmt: skip
    assert float((found - wanted).norm()) < float((uniform - wanted).norm())


@pytest.mark.slow
def test_a_job_stopped_while_measuring_or_later_makes_the_same_bytes(
    dense: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"to": "compressed-tensors", "target_bits": 5.0, "calibration": (str(text_file),), **COMPACT}
    dsquant.awq(dense, output=tmp_path / "whole", **options)

    def stop(*arguments: Any) -> None:
        raise Interrupted("here")

    for place in ("dsquant.precision.sensitivity.allocate", "dsquant.pipeline.units._run_layer"):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(place, stop)
            dsquant.awq(dense, output=tmp_path / "out", resume=True, **options)
    with monkeypatch.context() as patch:
        patch.setattr("dsquant.precision.sensitivity.measure_layer", stop)  # what was found is kept
        dsquant.awq(dense, output=tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    dsquant.awq(dense, output=tmp_path / "out", restart=True, **{**options, "target_bits": 9.0})
    assert dsquant.verify(tmp_path / "out").findings == []


@pytest.mark.slow
def test_killed_and_resumed_it_makes_the_same_bytes(dense: Path, text_file: Path, tmp_path: Path) -> None:
    more = ("--to", "compressed-tensors", "--target-bits", "5.0", "--resume")
    forked.finish(*arguments(dense, text_file, tmp_path / "whole", *more))
    command, job = arguments(dense, text_file, tmp_path / "out", *more), tmp_path / "out" / ".dsquant-work" / "job.json"
    for marker in (lambda: job.is_file(), lambda: '"sensitivity"' in job.read_text()):
        process = forked.start(*command)
        while process.poll() is None and not marker():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    forked.finish(*command)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_bits": 2.1}, r"--target-bits 2.1: .* gives from 2\.\d+ to 8.0\d+ bits"),
        ({"target_bits": 17.0, "rest": "bf16"}, "to 16.0 bits"),
        ({"target_size": "1KiB"}, r"--target-size 1.0 KiB: .* gives from .* bytes .*iB to .*iB"),
        ({"target_bits": 4.5, "target_size": "1MiB"}, "exclude each other"),
        ({"target_bits": 4.5, "mtp": "quantize"}, "--mtp keep or drop"),
        ({"target_bits": 4.5, "to": ["gguf:Q4_K_M", "gguf:Q5_K_M"]}, "types of one GGUF output"),
    ],
)
def test_what_cannot_be_met_is_refused_before_any_work(
    narrow_r1: Path, text_file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    options = {"to": "compressed-tensors", "calibration": (str(text_file),), **COMPACT, **changes}
    with pytest.raises(UsageError, match=message):
        dsquant.awq(narrow_r1, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_each_of_several_formats_gets_the_widths_of_a_job_of_its_own(
    narrow_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {**COMPACT, "calibration": str(text_file), "target_bits": 6.0, "symmetric": True}
    formats = ("awq", "compressed-tensors")
    together = dsquant.awq(narrow_r1, output=tmp_path / "all", to=formats, **options)
    widths = [{group: entry["width"] for group, entry in together.precision[name].items()} for name in formats]
    assert widths[0] != widths[1]  # of one grid: awq has no 8 bits
    alone = dsquant.awq(narrow_r1, output=tmp_path / "alone", to=formats[1], **options)
    assert alone.precision == together.precision[formats[1]]
    for path in alone.output.glob("*.safetensors"):
        assert (together.folders[formats[1]] / path.name).read_bytes() == path.read_bytes()
    assert "| group | stored as |" in (together.folders["awq"] / "README.md").read_text()


def test_a_target_that_is_not_used_up_is_told_of(narrow_r1: Path, text_file: Path, tmp_path: Path) -> None:
    options = {"calibration": str(text_file), **COMPACT, "preset": "quality", "target_bits": 5.5}
    told = dsquant.awq(narrow_r1, output=tmp_path / "out", to="awq", **options).warnings
    assert any(re.search(r"--target-bits 5.5: .* of .* no group .* compressed-tensors has 8 bits", one) for one in told)


@pytest.mark.parametrize(("to", "option"), [("awq", "target_size"), ("compressed-tensors", "target_bits")])
def test_both_ends_of_the_range_that_a_refusal_names_can_be_met(narrow_r1: Path, to: str, option: str) -> None:
    def plan(target: float) -> None:
        fields = {"model": str(narrow_r1), "output": Path("out"), "to": (to,), "preset": "compact", "group_size": 64}
        recipe = Recipe.checked(**fields, device="cpu", **{option: target})
        plan_run(recipe, *open_model(recipe.model))

    with pytest.raises(UsageError) as refused:
        plan(1)
    ends = re.search(r"from ([\d.]+) to ([\d.]+) b", str(refused.value))
    assert ends is not None
    for end in ends.groups():
        plan(float(end))


def test_other_than_four_and_eight_bits_are_chosen_only_where_these_do_not_fit(
    narrow_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    from dsquant.pipeline import job as pipeline

    fields = {"model": str(narrow_r1), "to": ("compressed-tensors",), "preset": "compact", "group_size": 64}
    texts = {"calibration": (str(text_file),), "samples": 4, "seq_len": 32}
    narrow, wide, uniform = (
        pipeline.preview(Recipe.checked(**fields, **texts, output=tmp_path / "out", **chosen))
        for chosen in ({"target_bits": 4.0}, {"target_bits": 4.6}, {"bits": 3})
    )
    assert "one of 2, 3, 4, 5, 6, 7, FP8" in narrow.details["target"]
    assert any("2, 3, 5, 6 or 7 bits" in note for note in narrow.notes)
    assert "one of 4, FP8" in wide.details["target"] and not any(" bits" in note for note in wide.notes)
    assert any(note.startswith("linears of 3 bits") for note in uniform.notes)
    assert not (tmp_path / "out").exists()


def test_lists_name_a_layers_experts_as_engines_ask_for_them() -> None:
    experts = [f"model.layers.{layer}.mlp.experts.{number}.up_proj" for layer in (3, 13) for number in range(2)]
    shared = [f"model.layers.{layer}.mlp.shared_experts.up_proj" for layer in (3, 13)]
    linears = dict.fromkeys([*experts[2:], *shared], True) | dict.fromkeys(experts[:2], False)
    assert "model.layers.3.mlp.experts" in skipped_modules(linears)
    targets = targets_by_width(dict.fromkeys(experts, 4) | dict.fromkeys(shared, 8))
    assert targets == {
        4: [r"re:.*layers\.(3|13)\.mlp\.experts\.\d+\.up_proj$", "Linear"],
        8: [r"re:.*layers\.(3|13)\.mlp\.shared_experts\.up_proj$"],
    }


def test_engines_find_a_fused_layer_by_its_own_name_before_the_class_linear() -> None:
    of_four = {f"model.layers.{n}.mlp.experts.{e}.gate_proj": 4 for n in (3, 4) for e in range(8)}
    names = ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa")  # vLLM's and SGLang's
    fused = {f"self_attn.{name}": ("q_a_proj", "kv_a_proj_with_mqa") for name in names}
    fused |= {"mlp.shared_experts.gate_up_proj": ("gate_proj", "up_proj")}
    parts = [f"{module.rpartition('.')[0]}.{part}" for module, found in fused.items() for part in found]
    widths = of_four | {f"model.layers.{n}.{part}": bits for n, bits in ((3, 4), (4, 8)) for part in parts}
    targets = targets_by_width(widths)
    assert [bits for bits, found in targets.items() if "Linear" in found] == [4]
    names = widths | {f"model.layers.{n}.{module}": bits for n, bits in ((3, 4), (4, 8)) for module in fused}
    for name, bits in names.items():
        found = {width for width, of in targets.items() for one in of if one != "Linear" and re.match(one[3:], name)}
        assert found == {bits}, name
