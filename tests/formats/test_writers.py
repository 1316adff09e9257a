"""Formats: golden bytes, round trips, the formats' own packages as judges, shards planned to the byte."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_jobs import changed_copy, noise

import dsquant
from dsquant.errors import InputError, UsageError
from dsquant.formats.checkpoints import stored_weights
from dsquant.formats.output_shards import ShardFile, StoredTensor, plan_shards, write_index
from dsquant.formats.table import FORMATS
from dsquant.formats.wanted import Linears
from dsquant.schemes import Grid, QuantizedWeight, round_to_nearest
from dsquant.source.shards import read_index

LINEAR = "model.layers.0.self_attn.o_proj"
WIDTHS = range(2, 9)


def counting_weight(grid: Grid, rows: int, columns: int) -> QuantizedWeight:
    """Codes 0, 1, 2, ... so that every place in a word can be told."""
    codes = (torch.arange(rows * columns) % (grid.maximum_code + 1)).view(rows, columns).to(torch.uint8)
    groups = columns // grid.group_size
    zero_points = torch.full((rows, groups), grid.middle, dtype=torch.uint8)
    return QuantizedWeight(codes, torch.full((rows, groups), 0.5), zero_points, grid)


def write(folder: Path, format_name: str, weight: QuantizedWeight) -> Path:
    output_format = FORMATS[format_name]
    rows, columns = weight.codes_OI.shape
    plan = plan_shards([("unit", output_format.stored(LINEAR, (rows, columns), weight.grid))], 2**30)
    shard = ShardFile(folder, plan.shards[0])
    for name, tensor in output_format.pack(LINEAR, weight).items():
        shard.write_rows(name, 0, tensor)
    shard.commit()
    write_index(folder, plan)
    return folder


def test_awq_words_hold_columns_0_2_4_6_1_3_5_7_from_the_lowest_bits_up() -> None:
    grid = Grid(4, 32, symmetric=False)
    weight = counting_weight(grid, 64, 32)
    weight.codes_OI[:] = torch.arange(64).unsqueeze(1) % 16  # the code is the output channel's number
    packed = FORMATS["awq"].pack(LINEAR, weight)
    assert packed[f"{LINEAR}.qweight"].shape == (32, 8) and packed[f"{LINEAR}.qweight"].dtype == torch.int32
    assert packed[f"{LINEAR}.qweight"][0, 0].item() & 0xFFFFFFFF == 0x75316420
    assert packed[f"{LINEAR}.qweight"][0, 1].item() & 0xFFFFFFFF == 0xFDB9ECA8
    assert packed[f"{LINEAR}.qzeros"][0, 0].item() & 0xFFFFFFFF == 0x88888888
    assert packed[f"{LINEAR}.scales"].dtype == torch.float16


def test_compressed_words_are_a_dense_stream_from_the_lowest_bits_up() -> None:
    four = FORMATS["compressed-tensors"].pack(LINEAR, counting_weight(Grid(4, 32, True), 1, 32))
    assert [word & 0xFFFFFFFF for word in four[f"{LINEAR}.weight_packed"][0].tolist()] == [0x76543210, 0xFEDCBA98] * 2
    assert set(four) == {f"{LINEAR}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")}
    for bits in WIDTHS:
        grid = Grid(bits, 32, False)
        weight = counting_weight(grid, 32, 32)
        weight.zero_points_OG[:] = torch.arange(32).unsqueeze(1) % 2**bits
        stream = sum((number % 2**bits) << (bits * number) for number in range(32))
        words = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(bits)]
        packed = FORMATS["compressed-tensors"].pack(LINEAR, weight)
        assert [word & 0xFFFFFFFF for word in packed[f"{LINEAR}.weight_packed"][0].tolist()] == words
        assert [word & 0xFFFFFFFF for word in packed[f"{LINEAR}.weight_zero_point"][:, 0].tolist()] == words


GRIDS = [
    ("awq", Grid(4, 32, False)),
    ("awq", Grid(4, 64, True)),
    *(("compressed-tensors", Grid(bits, 32, symmetric)) for bits in WIDTHS for symmetric in (True, False)),
]


@pytest.mark.parametrize(("format_name", "grid"), GRIDS, ids=str)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 4), groups=st.integers(1, 3), seed=st.integers(0, 2**16), spread=st.floats(1e-3, 1e3))
def test_the_formats_own_package_reads_back_what_was_rounded(
    tmp_path_factory: Any, format_name: str, grid: Grid, rows: int, groups: int, seed: int, spread: float
) -> None:
    weight = torch.randn(64 * rows, grid.group_size * groups, generator=torch.Generator().manual_seed(seed)) * spread
    rounded = round_to_nearest(weight, grid)
    folder = write(tmp_path_factory.mktemp("format"), format_name, rounded)
    config = FORMATS[format_name].quantization_config(grid, Linears({LINEAR: True}))
    found = stored_weights(read_index(folder), {"quantization_config": config})[f"{LINEAR}.weight"]
    assert torch.equal(found, rounded.dequantize())
    half_step = rounded.scales_OG.repeat_interleave(grid.group_size, 1) * 0.51
    inside = (rounded.codes_OI > 0) & (rounded.codes_OI < grid.maximum_code)
    assert bool(((found - weight).abs() <= half_step)[inside].all())


def test_autoawqs_own_module_holds_exactly_these_tensors(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True):
        from awq.modules.linear.gemm import WQLinear_GEMM

    grid = Grid(4, 64, False)
    rounded = round_to_nearest(torch.randn(128, 256), grid)
    linear = torch.nn.Linear(256, 128, bias=False)
    linear.weight.data = rounded.dequantize()
    theirs = WQLinear_GEMM.from_linear(
        linear, 4, 64, scales=rounded.scales_OG.T.contiguous(), zeros=rounded.zero_points_OG.T.float().contiguous()
    )
    ours = FORMATS["awq"].pack(LINEAR, rounded)
    for part in ("qweight", "qzeros", "scales"):
        assert torch.equal(getattr(theirs, part), ours[f"{LINEAR}.{part}"]), part


@pytest.mark.parametrize("name", ["awq", "compressed-tensors"])
def test_a_mixture_in_a_format_that_transformers_misreads_says_so(nano_r1: Path, tmp_path: Path, name: str) -> None:
    result = dsquant.awq(
        nano_r1, output=tmp_path / "out", to=name, group_size=64, samples=2, seq_len=16, calibration="code",
        steps="none", evaluate=False, progress=False,
    )  # fmt: skip
    told = any("without its experts' weights" in warning for warning in result.warnings)
    card = (tmp_path / "out" / "README.md").read_text()
    assert told == ("library_name" not in card) == (name == "awq")


def test_transformers_loads_a_compressed_mixture_with_the_weights_that_dsquant_reads(
    nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    from checkpoints import full_model
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    import dsquant
    from dsquant.formats.checkpoints import open_checkpoint

    dsquant.awq(
        nano_r1, output=tmp_path / "out", to="compressed-tensors", rest="bf16", preset="compact", steps="none",
        group_size=64, samples=4, seq_len=32, calibration=(str(text_file),), evaluate=False, progress=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the config given here wins
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
        ).float()
    wanted = full_model(tmp_path / "out", open_checkpoint(tmp_path / "out").weights).state_dict()
    found = model.state_dict()
    assert set(found) == set(wanted)
    for name, values in wanted.items():  # it keeps some weights in bfloat16, so products are rounded once more
        assert float((found[name] - values).abs().max()) <= 2**-8 * float(values.abs().max()), name


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=5), min_size=1, max_size=5),
    limit=st.integers(8, 400),
    seed=st.integers(0, 99),
)
def test_shards_are_exactly_as_planned_and_never_span_units(
    tmp_path_factory: Any, sizes: list[list[int]], limit: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    units = [
        (f"u{u}", [StoredTensor(f"u{u}.t{t}", "BF16", (rows, 2)) for t, rows in enumerate(unit)])
        for u, unit in enumerate(sizes)
    ]
    plan = plan_shards(units, limit)
    values = {
        t.name: torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)) for _, ts in units for t in ts
    }
    for planned in plan.shards:
        shard = ShardFile(folder, planned)
        for tensor in reversed(planned.tensors):
            value = values[tensor.name].to(torch.bfloat16)
            shard.write_rows(tensor.name, 0, value[:1])
            shard.write_rows(tensor.name, 1, value[1:])
        shard.commit()
        assert (folder / planned.file_name).stat().st_size == planned.num_bytes
        assert len(planned.tensors) == 1 or sum(t.num_bytes for t in planned.tensors) <= limit
        assert {t.name.split(".")[0] for t in planned.tensors} == {planned.unit}
    write_index(folder, plan)
    index = read_index(folder)
    assert set(index) == set(values)
    for name, info in index.items():
        assert torch.equal(load_file(info.path)[name], values[name].to(torch.bfloat16))


def test_an_unfinished_shard_has_no_name_and_leaves_nothing_when_discarded(tmp_path: Path) -> None:
    plan = plan_shards([("u", [StoredTensor("t", "F32", (4,))])], 100)
    shard = ShardFile(tmp_path, plan.shards[0])
    shard.write_rows("t", 0, torch.zeros(2))
    assert not (tmp_path / plan.shards[0].file_name).exists()
    with pytest.raises(AssertionError, match="8 of 16 bytes of t"):
        shard.commit()
    shard.discard()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format_name", "grid", "shape", "message"),
    [
        ("awq", Grid(8, 128, False), (64, 128), "4-bit"),
        ("awq", Grid(4, 128, False), (64, 192), "multiple"),
        ("awq", Grid(4, 64, False), (72, 128), "rows must be a multiple of 64"),
        ("compressed-tensors", Grid(4, 128, True), (64, 192), "multiple"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    format_name: str, grid: Grid, shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        FORMATS[format_name].check(grid, {LINEAR: shape})


@pytest.mark.parametrize(
    ("widths", "mixture", "symmetric", "told"),
    [
        ((4,), True, True, ()),
        ((8,), True, True, ()),
        ((5,), False, True, ("linears of 5 bits: vLLM 0.33 ",)),
        ((4,), False, False, ("vLLM and SGLang take them",)),
        ((4,), True, False, ("vLLM 0.33 and SGLang 0.5.23 take them",)),
        ((8,), True, False, ("Humming kernels alone",)),
        ((2,), True, False, ("linears of 2 bits", "Humming kernels alone")),
    ],
)
def test_notes_name_the_engines_that_take_a_width_and_zero_points(
    widths: tuple[int, ...], mixture: bool, symmetric: bool, told: tuple[str, ...]
) -> None:
    notes = FORMATS["compressed-tensors"].engine_notes(widths, mixture, False, symmetric)
    assert len(notes) == len(told) and all(words in note for words, note in zip(told, notes, strict=True))


def test_experts_of_any_width_with_zero_points_are_verified_evaluated_and_requantized(
    nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    def made(bits: int, name: str, **options: Any) -> Any:
        return dsquant.awq(
            nano_r1, output=tmp_path / name, to="compressed-tensors", bits=bits, symmetric=False, group_size=64,
            samples=2, seq_len=16, calibration=str(text_file), progress=False, **options,
        )  # fmt: skip

    five = made(5, "five", steps="scales")
    assert any("Humming kernels alone" in warning for warning in five.warnings)
    assert all(found.mean_kl < 0.1 for found in five.divergence["compressed-tensors"].values())
    assert dsquant.verify(tmp_path / "five", everything=True, progress=False).ok
    assert "5-bit" in (tmp_path / "five" / "README.md").read_text()
    changed_copy(nano_r1, tmp_path / "new", noise(0.1, seed=3))
    again = dsquant.delta(tmp_path / "five", tmp_path / "new", output=tmp_path / "delta", progress=False)
    assert any(".experts." in name for name in again.changed)
    assert dsquant.verify(tmp_path / "delta", everything=True, progress=False).ok


def test_a_packed_linear_without_its_scales_is_refused(tmp_path: Path) -> None:
    grid = Grid(4, 32, False)
    folder = write(tmp_path, "awq", counting_weight(grid, 64, 32))
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    shard = folder / content["weight_map"].pop(f"{LINEAR}.scales")
    path.write_text(json.dumps(content))
    save_file({name: tensor for name, tensor in load_file(shard).items() if name != f"{LINEAR}.scales"}, shard)
    with pytest.raises(InputError, match=r"qweight.*scales"):
        config = FORMATS["awq"].quantization_config(grid, Linears({LINEAR: True}))
        stored_weights(read_index(folder), {"quantization_config": config})


def test_an_unknown_method_is_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path, "awq", counting_weight(Grid(4, 32, False), 64, 32))
    with pytest.raises(InputError, match="'bitsandbytes'"):
        stored_weights(read_index(folder), {"quantization_config": {"quant_method": "bitsandbytes"}})


@pytest.mark.slow
def test_threads_write_tensors_of_one_shard_at_the_same_time(tmp_path: Path) -> None:
    planned = [StoredTensor(f"t{number}", "F32", (257, 1024)) for number in range(16)]
    plan = plan_shards([("unit", planned)], 2**30)
    shard = ShardFile(tmp_path, plan.shards[0])
    tensors = {tensor.name: torch.full(tensor.shape, float(place)) for place, tensor in enumerate(planned)}

    def write_all(name: str) -> None:
        for start in range(257):
            shard.write_rows(name, start, tensors[name][start : start + 1])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_all, tensors))
    shard.commit()
    found = load_file(tmp_path / plan.shards[0].file_name)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
