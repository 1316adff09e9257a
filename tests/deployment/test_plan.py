"""`dsquant plan`: sizes against what is written, R1 from its config alone, a hub by ranges, machines, words."""

import json
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import psutil
import pytest
import torch
from checkpoints import LLAMA, QWEN2, add_tokenizer, make_dense, make_pico_r1
from click.testing import CliRunner
from hub_server import hub_of
from r1_config import R1_CONFIG
from shapes import SMALLEST

import dsquant
from dsquant.cli import main
from dsquant.deployment import sizes
from dsquant.deployment.facts import BEST, GIB, KL_OF_FEW_BITS
from dsquant.deployment.forecast import CANDIDATES, Forecast, MachineForecast, forecast, forecast_of, reference_machines
from dsquant.deployment.hardware import parse_machine, parse_speed, this_machine
from dsquant.deployment.placement import network_of
from dsquant.deployment.sizes import PRESETS, OutputSize, output_sizes
from dsquant.deployment.subject import open_subject
from dsquant.errors import InputError, UsageError
from dsquant.formats.gguf.types import MIXTURES
from dsquant.formats.table import SAFETENSORS
from dsquant.model.families.family import Cache, Sizes

BITS = {name: SAFETENSORS[name].bits for name in ("awq", "compressed-tensors")}
FAST: dict[str, Any] = {
    "samples": 2, "seq_len": 16, "steps": "none", "calibration": "code", "evaluate": False, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An R1 of two layers whose linears have whole groups of 128 weights."""
    shape = {**SMALLEST, "moe_intermediate_size": 128, "intermediate_size": 256}
    return add_tokenizer(make_pico_r1(tmp_path_factory.mktemp("small") / "small", **shape))


@pytest.fixture(scope="module")
def small_sizes(small: Path) -> dict[tuple[str, str], OutputSize]:
    sizes, refused = output_sizes(open_subject(str(small)))
    assert not refused
    return {(size.name, size.mtp): size for size in sizes}


@pytest.fixture(scope="module")
def r1() -> Callable[..., Forecast]:
    """R1's forecast from its config alone; its sizes at 4 bits are worked out once: each takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(R1_CONFIG))
        subject = open_subject(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "SAFETENSORS", {name: SAFETENSORS[name] for name in BITS})
        patch.setattr(type(SAFETENSORS["compressed-tensors"]), "bits", (4,))
        outputs = output_sizes(subject)

    def of(gpu_price: float | None = None, **machine: Any) -> Forecast:
        named = [parse_machine(machine.pop("gpu"), machine.pop("ram"), **machine)] if machine else []
        return forecast_of(subject, outputs, named or reference_machines(), gpu_price)

    return of


def written(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf")]
    return sum(path.stat().st_size for path in files if path.name != "imatrix.gguf")


@pytest.mark.parametrize(
    ("preset", "mtp", "bits"),
    [
        ("compact", "quantize", 4),
        *(
            pytest.param(preset, mtp, bits, marks=pytest.mark.slow)
            for preset in PRESETS
            for bits in BITS["compressed-tensors"]
            for mtp in ("keep", "drop", "quantize")
            if (preset, mtp, bits) != ("compact", "quantize", 4)
        ),
    ],
)
def test_the_planned_size_of_a_safetensors_output_is_what_is_written(
    small: Path, small_sizes: dict[tuple[str, str], OutputSize], tmp_path: Path, preset: Any, mtp: Any, bits: Any
) -> None:
    formats = [name for name, widths in BITS.items() if bits in widths]
    result = dsquant.awq(small, output=tmp_path / "out", to=formats, preset=preset, mtp=mtp, bits=bits, **FAST)
    for name in formats:
        size = small_sizes[f"{name} {preset}{'' if bits == 4 else f' {bits}-bit'}", mtp]
        assert size.exact
        assert size.num_bytes == written(result.folders[name])


@pytest.mark.parametrize(
    ("type_name", "mtp"),
    [
        ("Q4_K_M", "drop"),
        ("Q2_K", "keep"),
        ("BF16", "drop"),
        *(pytest.param(name, mtp, marks=pytest.mark.slow) for name in MIXTURES for mtp in ("drop", "keep")),
    ],
)
def test_the_planned_size_of_a_gguf_output_is_what_is_written(
    small: Path, small_sizes: dict[tuple[str, str], OutputSize], tmp_path: Path, type_name: str, mtp: str
) -> None:
    options = {name: FAST[name] for name in ("evaluate", "progress")}
    if MIXTURES[type_name] not in ("F32", "F16", "BF16"):
        options |= {"scales": False, **{name: FAST[name] for name in ("samples", "seq_len", "calibration")}}
    dsquant.gguf(small, type=type_name, output=tmp_path / "out", mtp=mtp, **options)
    size = small_sizes[f"gguf:{type_name}", mtp]
    assert size.exact
    assert size.num_bytes == written(tmp_path / "out")


def test_r1s_release_follows_from_its_config_alone_to_the_byte(r1: Callable[..., Forecast]) -> None:
    found = r1()
    assert found.num_tensors == 91_991
    assert found.source_bytes == 688_574_839_360
    assert found.source_bytes / GIB == pytest.approx(641.3, abs=0.05)
    assert found.network.kv_bytes_per_token == 70_272


def test_r1s_outputs_have_the_sizes_that_were_published_for_them(r1: Callable[..., Forecast]) -> None:
    sizes = {(size.name, size.mtp): size for size in r1().sizes}
    assert sizes["gguf:Q4_K_M", "drop"].num_bytes / 1e9 == pytest.approx(404.5, rel=0.001)
    for name, quality in (("awq", 346), ("compressed-tensors", 331.8)):  # the rest in BF16, in FP8
        assert sizes[f"{name} compact", "drop"].num_bytes / GIB == pytest.approx(326, rel=0.01)
        assert sizes[f"{name} quality", "drop"].num_bytes / GIB == pytest.approx(
            quality, rel=0.01 if name == "awq" else 0.0005
        )
    mtp = sizes["awq quality", "keep"].num_bytes - sizes["awq quality", "drop"].num_bytes
    assert mtp == pytest.approx(2 * 13_463_426_304, rel=0.001)  # BF16, with the copies of embedding and head


def test_a_bare_config_gives_the_tensor_bytes_that_headers_give(tiny_r1: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_r1 / "config.json").read_text())
    bare, whole = (open_subject(model) for model in (str(tmp_path), "tiny-r1"))
    stored = {name: (info.dtype, info.shape) for name, info in whole.checkpoint.index.items()}
    assert {name: (info.dtype, info.shape) for name, info in bare.checkpoint.index.items()} == stored
    for planned, exact in zip(output_sizes(bare)[0], output_sizes(whole)[0], strict=True):
        assert (planned.name, planned.mtp, planned.by_kind) == (exact.name, exact.mtp, exact.by_kind)
    found = forecast(str(tmp_path / "config.json"))
    assert any("no tokenizer.json" in note for note in found.notes)
    assert not any(size.exact for size in found.sizes)


def test_a_mixtures_config_whose_layers_are_all_dense_is_placed_like_a_dense_models() -> None:
    network = network_of({**R1_CONFIG, "first_k_dense_replace": 61})
    assert (network.has_experts, network.num_split, network.first_split) == (False, 61, 0)


def test_a_dense_model_has_one_preset_and_no_mtp_column(tmp_path: Path) -> None:
    found = forecast(str(make_dense(tmp_path / "model", LLAMA)), gpu="1x24GiB", ram="32GiB")
    assert {size.preset for size in found.sizes} == {None, "compact"}
    assert {size.mtp for size in found.sizes} == {"none"}
    assert not any("--mtp" in (size.command or "") for size in found.sizes)
    assert found.machines[0].best is not None and "vLLM" in found.machines[0].best.commands


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "not supported"),
        ({**R1_CONFIG, "n_routed_experts": 10**9}, "n_routed_experts"),
        ({**R1_CONFIG, "quantization_config": {"quant_method": "awq"}}, "already quantized"),
        ([1], "JSON object"),
    ],
)
def test_a_config_that_cannot_be_planned_is_refused(tmp_path: Path, config: Any, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        open_subject(str(tmp_path / "config.json"))


@pytest.mark.slow
def test_a_hub_model_is_planned_from_its_headers_without_its_weights(tiny_r1: Path, tmp_path: Path) -> None:
    with hub_of({"someone/tiny": tiny_r1}) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        how: dict[str, Any] = {"environment": environment, "before": partial(forked.anew, "huggingface_hub")}
        found = forked.start("plan", "someone/tiny", "--json", **how)
        missing = forked.start("plan", "someone/else", **how)
        (told, errors), (_, refusal) = found.communicate(), missing.communicate()
        assert found.returncode == 0, errors
    remote, local = json.loads(told), forecast("tiny-r1").as_json()
    keys = ("name", "mtp", "num_bytes", "exact")
    assert [{key: size[key] for key in keys} for size in remote["sizes"]] == [
        {key: size[key] for key in keys} for size in local["sizes"]
    ]
    shards = [path.name for path in tiny_r1.glob("*.safetensors")]
    assert sum(hub.bytes_sent[name] for name in shards) <= 100_001 * len(shards)
    assert missing.returncode == 3 and "'someone/else'" in refusal


def on(found: Forecast, name: str) -> Any:
    (machine,) = found.machines
    return next(row for row in machine.deployments if row.output.name == name)


def the(found: Forecast) -> MachineForecast:
    (machine,) = found.machines
    return machine


def test_r1_at_four_bits_does_not_fit_four_small_cards_and_the_plan_says_why(r1: Callable[..., Forecast]) -> None:
    found = r1(gpu="4x24GiB", ram="64GiB", disk_read="7GB/s", gpu_price=0.4)
    words = " ".join(the(found).statements)
    assert "325 to 332 GiB" in words and "4x24 GiB" in words and "in RAM or on disk" in words
    assert "factor of 1.1, not 3" in words
    assert on(found, "awq compact").placement.kind == "none"
    offloaded = on(found, "gguf:Q4_K_M")
    assert offloaded.placement.disk_bytes > 200 * GIB
    assert 0.05 < offloaded.placement.tokens_per_s.low < offloaded.placement.tokens_per_s.high < 1.5
    assert "_exps=CUDA3" in offloaded.commands["llama.cpp"] and "_exps=CPU" in offloaded.commands["llama.cpp"]
    assert offloaded.price_per_million.low > 100


def test_machines_run_what_people_have_run_on_them(r1: Callable[..., Forecast]) -> None:
    best = {str(found.machine): found.best for found in r1().machines}
    names = {machine: row.output.name for machine, row in best.items() if row is not None}
    assert names["8x141 GiB GPU, 1024 GiB RAM"] == "source"
    assert names["8x80 GiB GPU, 512 GiB RAM"] == "compressed-tensors quality"
    assert names["8x48 GiB GPU, 256 GiB RAM"] == "compressed-tensors quality"
    assert names["1x24 GiB GPU, 512 GiB RAM"].startswith("gguf:")
    h100 = best["8x80 GiB GPU, 512 GiB RAM"]
    assert h100 is not None and h100.placement.tokens_per_s is not None
    assert "--tensor-parallel-size 8" in h100.commands["vLLM"] and "--tp 8" in h100.commands["SGLang"]
    assert "--disable-shared-experts-fusion" in h100.commands["SGLang"]


def test_the_speed_range_holds_what_was_measured(r1: Callable[..., Forecast]) -> None:
    awq = on(r1(gpu="8x80GiB@3350GB/s", ram="512GiB"), "awq compact").placement.tokens_per_s
    assert awq.low < 61.5 < awq.high  # 8xH100, cognitivecomputations' model card
    transformers = on(r1(gpu="1x24GiB", ram="512GiB@307GB/s"), "gguf:Q4_K_M")
    assert transformers.placement.tokens_per_s.low < 8.73 < transformers.placement.tokens_per_s.high
    assert "ktransformers" in transformers.commands


def test_mlx_is_placed_in_memory_that_processor_and_gpu_share_and_nothing_of_vllms_is() -> None:
    (found,) = dsquant.plan("tiny-r1", unified_memory="64GiB@400GB/s").machines
    rows = {row.output.name: row for row in found.deployments}
    assert found.best is rows["mlx quality 8-bit"] and found.best.placement.kind == "unified"
    assert found.best.commands["mlx-lm"].startswith("mlx_lm.server --model tiny-r1-mlx")
    assert rows["awq compact"].placement.kind == rows["source"].placement.kind == "none"
    assert "-ngl 99" in rows["gguf:Q4_K_M"].commands["llama.cpp"]
    (small,) = dsquant.plan("tiny-r1", unified_memory="4GiB", context=16).machines
    assert {row.output.name: row.placement.kind for row in small.deployments}["mlx compact"] == "none"
    with pytest.raises(UsageError, match="leave --gpu and --ram out"):
        dsquant.plan("tiny-r1", unified_memory="64GiB", gpu="1x24GiB")


def test_the_best_has_the_most_bits_that_fit_and_trials_only_where_nothing_else_does(tmp_path: Path) -> None:
    """A dense model of 7 billion parameters: 14 GiB in BF16, 8 in 8 bits, 2 to 5 in fewer."""
    shape = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    more = {"num_key_value_heads": 4, "vocab_size": 152064, "head_dim": 128, "max_position_embeddings": 32768}
    (tmp_path / "config.json").write_text(json.dumps({**QWEN2, **shape, **more}))
    subject = open_subject(str(tmp_path))
    outputs = output_sizes(subject)

    def best(gpu: str | None, ram: str) -> str | None:
        (found,) = forecast_of(subject, outputs, [parse_machine(gpu, ram)]).machines
        return found.best.output.name if found.best else None

    assert best("1x24GiB", "32GiB") == "source"
    assert best("1x16GiB", "32GiB") == "compressed-tensors compact 8-bit"
    assert best("1x10GiB", "32GiB") == "compressed-tensors compact"
    assert best("1x6GiB", "12GiB") == "gguf:IQ3_XXS"
    assert best(None, "12GiB") == "gguf:Q6_K"
    (small,) = forecast_of(subject, outputs, [parse_machine("1x5400MiB", "12GiB")]).machines
    trial = next(row for row in small.deployments if row.output.name == "gguf:IQ2_XXS")
    assert trial.placement.kind == "gpu" and best("1x5400MiB", "12GiB") == "gguf:Q8_0"
    assert best(None, "8GiB") == "gguf:IQ2_XXS"
    assert best(None, "6GiB") == "gguf:Q4_K_M"  # from disk
    assert set(KL_OF_FEW_BITS) - set(CANDIDATES)  # a row in the table of sizes needs a figure, not a machine


@pytest.mark.parametrize(
    ("heads", "shared", "gpus", "ranks"),
    [(128, 1, 8, 8), (128, 1, 6, 2), (14, 2, 7, 1), (32, 8, 16, 16), (32, 8, 3, 1)],
)
def test_engines_divide_heads_evenly_and_copy_those_of_keys_and_values(
    heads: int, shared: int, gpus: int, ranks: int
) -> None:
    assert Sizes(Cache(shared, 64, is_shared=False), heads).tensor_parallel(gpus) == ranks


def test_a_disk_that_is_too_small_is_named(r1: Callable[..., Forecast]) -> None:
    found = on(r1(gpu="4x24GiB", ram="64GiB", disk="200GiB"), "gguf:Q4_K_M")
    assert found.placement.kind == "none" and "the disk 200" in found.placement.reason


@pytest.mark.parametrize(
    ("text", "expected"), [("7GB/s", 7e9), ("936", 936e9), ("3.35 TB/s", 3.35e12), ("500MB/s", 5e8), ("1GiB/s", 2**30)]
)
def test_speeds_are_read(text: str, expected: float) -> None:
    assert parse_speed(text).low == pytest.approx(expected)


@pytest.mark.parametrize(
    ("gpu", "count", "gib", "gbs"),
    [
        ("RTX 4090", 1, 24, 1008),
        ("2x NVIDIA H100 80GB", 2, 80, 3352),
        ("8xh200@4TB/s", 8, 141, 4000),
        ("4x3090", 4, 24, 936),
    ],
)
def test_a_card_is_known_by_its_name(gpu: str, count: int, gib: int, gbs: float) -> None:
    machine = parse_machine(gpu, None)
    assert machine.gpus is not None and machine.gpus.count == count and machine.gpus.memory_bytes == gib * 2**30
    assert machine.gpus.bandwidth.low == gbs * 1e9 and "32 GiB RAM (assumed)" in str(machine)


@pytest.mark.parametrize(
    "gpu",
    [
        "0x24GiB",
        "4x",
        "x",
        "4x24GiB@fast",
        "-1x24GiB",
        "24",
        "4x3051",
        "4x24KiB",
        "RTX 9999",
        "1000000000x1TiB",
        "٣x24GiB",
    ],
)
def test_a_machine_that_cannot_be_meant_is_refused(gpu: str) -> None:
    with pytest.raises(UsageError):
        parse_machine(gpu, "64GiB")


def test_a_plan_that_names_no_machine_begins_with_this_one(small: Path) -> None:
    here, *others = (found.machine for found in forecast(str(small)).machines)
    assert here.here and not any(other.here for other in others)
    assert GIB <= here.ram_bytes <= psutil.virtual_memory().total
    assert (here.gpus is not None) == torch.cuda.is_available()
    (named,) = forecast(str(small), ram="64GiB").machines
    assert not named.machine.here


@pytest.mark.gpu
def test_this_machines_gpus_are_counted() -> None:
    found = this_machine().gpus
    assert found is not None and found.count == torch.cuda.device_count()
    assert found.memory_bytes <= 1.1 * torch.cuda.get_device_properties(0).total_memory


def test_the_table_the_json_and_the_notebook_tell_the_same() -> None:
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["plan", "--gpu", "1x24GiB", "--ram", "64GiB"])
    assert shown.exit_code == 0, shown.stderr
    assert "11.6 MiB" in shown.stdout and "█" in shown.stdout and "vllm serve" in shown.stdout
    assert BEST in " ".join(shown.stdout.split())
    found = dsquant.plan("tiny-r1", gpu="1x24GiB", ram="64GiB")
    json.dumps(found.as_json())
    assert "11.6 MiB" in found._repr_html_() and "11.6 MiB" in str(found)


def test_the_table_of_sizes_has_what_is_usual_and_says_how_much_more_there_is() -> None:
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["plan", "--gpu", "1x24GiB"]).stdout
    names = {line.split("  ")[0].strip() for line in shown.splitlines()}
    assert {"compressed-tensors quality", "compressed-tensors quality 8-bit", "gguf:Q4_K_M", "gguf:IQ2_XXS"} <= names
    assert names >= KL_OF_FEW_BITS.keys()
    assert names.isdisjoint({"compressed-tensors quality 3-bit", "gguf:Q5_0", "gguf:F32"})
    found = re.search(r"(\d+) more widths and types", shown)
    assert found and 20 < int(found[1]) < 60


def test_a_search_on_a_gpu_is_forecast_where_one_was_measured(r1: Callable[..., Forecast]) -> None:
    makings = {making.output.name: making for making in r1().makings}
    awq = makings["awq compact"]
    assert awq.hours_on_gpu is not None and awq.hours_on_gpu.high < awq.hours.low
    k_quant, eights = makings["gguf:Q4_K_M"], makings["gguf:Q8_0"]
    assert k_quant.hours_on_gpu is not None and awq.hours_on_gpu.high < k_quant.hours_on_gpu.high < k_quant.hours.low
    assert eights.hours_on_gpu is None
