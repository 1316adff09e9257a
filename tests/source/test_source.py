"""Checkpoints are read as DeepSeek stores them: FP8 in ragged blocks, scales in other shards, ue8m0."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_pico_r1, quantize_fp8
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dsquant.errors import InputError
from dsquant.formats.checkpoints import open_checkpoint, stored_weights
from dsquant.kernels.fp8 import dequantize_fp8
from dsquant.source.checkpoint import StoredWeights
from dsquant.source.locate import locate
from dsquant.source.scan import SourceHashes, all_finite, scan
from dsquant.source.shards import ShardIndex, read_header, read_index


def test_fp8_is_multiplied_by_its_blocks_scale() -> None:
    weight = torch.full((3, 5), 2.0).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 10.0, 100.0], [0.5, 0.25, 0.125]])
    row, last = [2.0, 2.0, 20.0, 20.0, 200.0], [1.0, 1.0, 0.5, 0.5, 0.25]
    assert torch.equal(dequantize_fp8(weight, scales, (2, 2)), torch.tensor([row, row, last]))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 400), columns=st.integers(1, 400), seed=st.integers(0, 99))
def test_ragged_blocks_are_those_of_deepseeks_own_formula(rows: int, columns: int, seed: int) -> None:
    stored, scales = quantize_fp8(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    full = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    assert torch.equal(dequantize_fp8(stored, scales, (128, 128)), stored.float() * full)


def test_scales_that_are_powers_of_two_may_be_stored_as_ue8m0() -> None:
    stored = torch.randn(130, 130).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.5, 2.0], [4.0, 2.0**-20]])
    found = dequantize_fp8(stored, scales.to(torch.float8_e8m0fnu), (128, 128))
    assert torch.equal(found, dequantize_fp8(stored, scales, (128, 128)))


def test_some_rows_are_the_rows_of_the_whole(tmp_path: Path) -> None:
    weights = open_checkpoint(make_pico_r1(tmp_path / "m")).weights
    name = "model.layers.1.self_attn.q_b_proj.weight"
    assert torch.equal(weights.rows(name, 128, 300), weights[name][128:300])
    assert torch.equal(weights.rows(name, 77, 131), weights[name][77:131])
    assert torch.equal(weights.rows("lm_head.weight", 7, 9), weights["lm_head.weight"][7:9])


def test_opening_reads_no_weights(pico_r1: Path) -> None:
    assert open_checkpoint(pico_r1).index.bytes_read == 0


def test_a_tensor_that_the_index_does_not_name_is_read_all_the_same(tmp_path: Path) -> None:
    for number, names in enumerate([("a", "unnamed"), ("b",)]):
        save_file({name: torch.ones(2) for name in names}, tmp_path / f"{number}.safetensors")
    index = {"weight_map": {"a": "0.safetensors", "b": "1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(read_index(tmp_path)) == {"a", "b", "unnamed"}
    save_file({"b": torch.ones(2), "a": torch.zeros(2)}, tmp_path / "1.safetensors")
    with pytest.raises(InputError, match=r"tensor 'a' is in 0\.safetensors and in 1\.safetensors"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32]
)
def test_one_bad_value_is_found_in_every_format(dtype: torch.dtype) -> None:
    values = torch.randn(64, 64).to(dtype)
    values[3, 3] = torch.finfo(dtype).max
    assert all_finite(values)
    bad = values.float()
    bad[5, 6] = torch.nan
    assert not all_finite(bad.to(dtype))


def test_a_scan_hashes_every_tensor_and_differs_where_a_byte_differs(pico_r1: Path, tmp_path: Path) -> None:
    index = open_checkpoint(pico_r1).index
    hashes = scan(index, lambda name: None)
    assert set(hashes) == set(index) and all(len(found) == 64 for found in hashes.values())
    tensor = index.read("model.norm.weight")
    save_file({"model.norm.weight": tensor + 1}, tmp_path / "x.safetensors")
    from dsquant.source.shards import ShardIndex

    changed = scan(ShardIndex(tmp_path, read_header(tmp_path / "x.safetensors")), lambda name: None)
    assert changed["model.norm.weight"] != hashes["model.norm.weight"]


def test_what_is_read_is_hashed_once_whole_or_in_parts_and_the_rest_when_asked_for(pico_r1: Path) -> None:
    checkpoint = open_checkpoint(pico_r1)
    index, weights = checkpoint.index, checkpoint.weights
    expected = scan(index, lambda name: None)
    hashes = SourceHashes(index, {"model.norm.weight": "known"})
    whole, table, late = (
        f"model.layers.1.{name}.weight" for name in ("self_attn.q_b_proj", "mlp.gate", "self_attn.o_proj")
    )
    weights.prefetch([whole])
    for name in (whole, "model.norm.weight"):
        weights[name]
    for start in range(0, weights.shape(table)[0], 3):
        weights.rows(table, start, start + 3)
    weights.rows(late, 128, 256)  # not from the start
    read = {whole, f"{whole}_scale_inv", table, "model.norm.weight"}
    assert hashes.found == {name: expected[name] for name in read} | {"model.norm.weight": "known"}
    missing = list[str]()
    hashes.rest(list(index), missing.append)
    assert set(missing) == set(index) - read and hashes.found == expected | {"model.norm.weight": "known"}


@pytest.mark.parametrize("ahead", [True, False])
def test_a_value_that_is_no_number_is_named_when_it_is_read(tmp_path: Path, ahead: bool) -> None:
    save_file({"good": torch.ones(3), "bad": torch.tensor([1.0, torch.nan])}, tmp_path / "model.safetensors")
    index = read_index(tmp_path)
    weights, _ = StoredWeights(index, None), SourceHashes(index, {})
    weights.prefetch(["good", "bad"] if ahead else [])
    assert torch.equal(weights["good"], torch.ones(3))
    with pytest.raises(InputError, match=r"model\.safetensors: tensor 'bad' holds NaN or infinity in rows 0 to 1"):
        weights["bad"]


def test_the_embedded_model_a_folder_and_nothing_else_are_found(pico_r1: Path, tiny_r1: Path) -> None:
    assert locate("tiny-r1").resolve() == tiny_r1.resolve()
    assert locate(str(pico_r1)) == pico_r1


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
SCHEME = {"num_bits": 4, "group_size": 32, "symmetric": True, "strategy": "group", "type": "int"}
GROUP = {"targets": ["Linear"], "weights": SCHEME}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"g": GROUP},
}


def packed_linear(folder: Path, **changes: torch.Tensor) -> ShardIndex:
    """A checkpoint of one linear in both layouts, `awq.` and `packed.`."""
    tensors = {
        "awq.qweight": torch.zeros(128, 8, dtype=torch.int32),
        "awq.qzeros": torch.zeros(1, 8, dtype=torch.int32),
        "awq.scales": torch.ones(1, 64, dtype=torch.float16),
        "packed.weight_packed": torch.zeros(64, 8, dtype=torch.int32),
        "packed.weight_scale": torch.ones(64, 2, dtype=torch.bfloat16),
        "packed.weight_shape": torch.tensor([64, 64]),
    }
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file(tensors, folder / "model.safetensors")
    return read_index(folder)


def test_packed_linears_of_both_layouts_are_decoded(tmp_path: Path) -> None:
    index = packed_linear(tmp_path)
    assert stored_weights(index, {"quantization_config": AWQ})["awq.weight"].shape == (64, 128)
    assert stored_weights(index, {"quantization_config": PACKED})["packed.weight"].shape == (64, 64)


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (AWQ | {"bits": "x"}, {}),
        (AWQ | {"bits": 0}, {}),
        (AWQ | {"bits": None}, {}),
        (AWQ | {"group_size": 0}, {}),
        (AWQ | {"group_size": "x"}, {}),
        (AWQ, {"awq__qweight": torch.zeros(128, dtype=torch.int32)}),
        (AWQ, {"awq__qweight": torch.zeros(128, 8)}),
        (AWQ, {"awq__qzeros": torch.zeros(2, 8, dtype=torch.int32)}),
        (AWQ, {"awq__scales": torch.ones(2, 64, dtype=torch.float16)}),
        (PACKED | {"config_groups": [1]}, {}),
        (PACKED | {"config_groups": 3}, {}),
        (PACKED | {"config_groups": {"g": {}}}, {}),
        (PACKED | {"config_groups": {"g": GROUP | {"weights": SCHEME | {"num_bits": 0}}}}, {}),
        (PACKED | {"config_groups": {"g": GROUP | {"weights": SCHEME | {"symmetric": "yes"}}}}, {}),
        (PACKED | {"config_groups": {"g": GROUP | {"weights": SCHEME | {"type": "float"}}}}, {}),
        (PACKED | {"config_groups": {"g": {"weights": SCHEME}}}, {}),
        (PACKED | {"config_groups": {"g": GROUP | {"targets": []}}}, {}),
        (PACKED | {"config_groups": {"g": GROUP | {"targets": ["re:("]}}}, {}),
        (PACKED | {"ignore": ["lm_head", "re:.*"]}, {}),
        (PACKED | {"ignore": "lm_head"}, {}),
        (PACKED, {"packed__weight_zero_point": torch.zeros(8, 2, dtype=torch.int32)}),
        (PACKED, {"packed__weight_scale": torch.ones(64, 3, dtype=torch.bfloat16)}),
        (PACKED, {"packed__weight_packed": torch.zeros(64, 8)}),
    ],
)
def test_a_quantized_checkpoint_that_contradicts_itself_is_refused_by_name(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    index = packed_linear(tmp_path, **tensors)
    with pytest.raises(InputError, match=r"config\.json|tensor '"):
        stored_weights(index, {"quantization_config": config})


@pytest.mark.parametrize("change", [{"strategy": "channel"}, {"actorder": "group"}, {"observer": ["a"]}])
def test_what_compressed_tensors_refuses_in_a_config_is_told_with_its_reason(
    change: dict[str, Any], tmp_path: Path
) -> None:
    group = GROUP | {"weights": SCHEME | change}
    weights = stored_weights(packed_linear(tmp_path), {"quantization_config": PACKED | {"config_groups": {"g": group}}})
    with pytest.raises(InputError, match=r"config\.json: compressed-tensors refuses a config group: \S"):
        weights["packed.weight"]
