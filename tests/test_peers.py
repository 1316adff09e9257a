"""The benches' own decoders, which judge every method: each against weights known from elsewhere."""

import importlib
from pathlib import Path

import click
import pytest
import torch
from checkpoints import LLAMA, add_tokenizer, make_dense

import dsquant
from benchmarks import gguf_sizes
from benchmarks import quality_methods as known
from benchmarks.peers.decoding import decode_gguf, decode_gptq, stored_bits
from benchmarks.peers.rounded_inputs import rounded
from benchmarks.peers.to_bf16 import dequantized_tensors, is_mtp
from benchmarks.peers.tokens import chosen_windows
from dsquant.cli import main


def packed(codes_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes, one behind the other from the lowest bits, as int32 [R, C * bits / 32]."""
    rows = [sum(code << bits * place for place, code in enumerate(row)) for row in codes_RC.tolist()]
    stored = b"".join(row.to_bytes(codes_RC.shape[1] * bits // 8, "little") for row in rows)
    return torch.frombuffer(bytearray(stored), dtype=torch.int32).view(len(rows), -1)


def test_every_command_line_of_the_quality_table_is_one_of_dsquants() -> None:
    methods = [*known.PEERS, *known.own_methods(), *known.step_methods(), *known.width_methods()]
    assert len({method.name for method in methods}) == len(methods)
    with click.Context(main) as context:
        for method in (one for one in methods if one.environment is None):
            name, *options = method.options
            command = main.get_command(context, name)
            assert command is not None
            command.make_context(name, [*options, "--calibration", "code", "--output", "out", "tiny-r1"])


def test_every_job_of_the_table_of_gguf_sizes_is_a_recipe(tmp_path: Path) -> None:
    case = gguf_sizes.Case(Path("tiny-r1"), 0, tmp_path)
    words = ["tiny-r1", "--text", "code", "--wiki", "wiki", "--work", "work", "--llama", "bin", "--seeds", "0", "1"]
    assert gguf_sizes.parse(words).makers == ["llama", "rules", *gguf_sizes.STEPS, *gguf_sizes.CHOSEN]
    for maker in gguf_sizes.STEPS:
        recipe = gguf_sizes.recipe_of(case, maker, gguf_sizes.ROWS, tmp_path)
        assert recipe.to == tuple(f"gguf:{row}" for row in gguf_sizes.ROWS)
    assert not gguf_sizes.parse(words[:7]).llama
    for maker, preset in (("chosen", "compact"), ("chosen-best", "best")):
        recipe = gguf_sizes.recipe_of(case, maker, ["Q2_K"], tmp_path, "cpu", 3.09)
        assert (recipe.target_name, recipe.preset) == ("3.09bits", preset)


@pytest.mark.parametrize("experts", ["_exps", ""])
def test_types_by_hand_come_near_the_mixtures_bits(experts: str) -> None:
    names = ["attn_q_a", "attn_k_b", "attn_output", *(f"ffn_{part}{experts}" for part in ("gate", "up", "down"))]
    names += ["ffn_down", "ffn_gate_shexp"] if experts else []
    shapes = {f"blk.{layer}.{name}.weight": (8, 256, 512) for layer in range(4) for name in names}
    for bits in (3.5, 4.5, 5.5):
        types = gguf_sizes.hand_made(shapes, bits)  # `mean_bits` fails where two patterns or none fit a tensor
        assert gguf_sizes.mean_bits(shapes, types) == pytest.approx(bits, abs=0.3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_codes_zero_points_and_groups_are_decoded(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes_IO = torch.randint(0, 2**bits, (32, 64), generator=generator)
    zeros_GO = torch.randint(0, 2**bits, (2, 64), generator=generator)
    scales_GO = torch.rand(2, 64, generator=generator)
    group_I = torch.randperm(32, generator=generator) % 2  # activation order: neighbours in different groups
    stored = {
        "a.qweight": packed(codes_IO.t(), bits).t().contiguous(),
        "a.qzeros": packed((zeros_GO - 1) % 2**bits, bits),
        "a.scales": scales_GO,
        "a.g_idx": group_I.int(),
        "b.weight": torch.ones(3),
    }
    weights = decode_gptq(stored, {"bits": bits})
    expected_IO = torch.stack([(codes_IO[i] - zeros_GO[g]) * scales_GO[g] for i, g in enumerate(group_I.tolist())])
    assert torch.equal(weights["a.weight"], expected_IO.t()) and weights["b.weight"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="gptq_v2"):
        decode_gptq(stored, {"bits": bits, "checkpoint_format": "gptq_v2"})


def test_a_gguf_file_is_decoded_under_the_original_names(tiny_r1: Path, tmp_path: Path) -> None:
    result = dsquant.gguf(
        tiny_r1, type="BF16", output=tmp_path / "out", calibration="none", mtp="drop", evaluate=False, progress=False
    )
    gguf_sizes.keep(result.folders["gguf:BF16"], tiny_r1, tmp_path / "kept")
    found, expected = decode_gguf(tmp_path / "kept"), dequantized_tensors(tiny_r1)
    expected = {name: weight for name, weight in expected.items() if not is_mtp(name, 4)}
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=2**-8, atol=0)


def test_a_gguf_file_of_a_llama_is_decoded_under_the_original_names(tmp_path: Path) -> None:
    model = add_tokenizer(make_dense(tmp_path / "model", LLAMA), vocabulary=280)
    result = dsquant.gguf(
        model, type="F32", output=tmp_path / "out", calibration="none", evaluate=False, progress=False
    )
    gguf_sizes.keep(result.folders["gguf:F32"], model, tmp_path / "kept")
    found, expected = decode_gguf(tmp_path / "kept"), dequantized_tensors(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_stored_bits_count_codes_zero_points_and_scales(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    for form, bits in (("awq", 4 + 4 / 64 + 16 / 64), ("compressed-tensors", 4 + 16 / 64)):
        options = {"symmetric": True, "rest": "bf16"} if form == "compressed-tensors" else {}
        output = tmp_path / form
        dsquant.awq(
            nano_r1,
            to=[form],
            calibration=text_file,
            steps="none",
            group_size=64,
            preset="compact",
            output=output,
            samples=4,
            seq_len=64,
            evaluate=False,
            progress=False,
            **options,
        )
        assert stored_bits(output) == pytest.approx(bits)


def test_each_seed_chooses_other_windows_that_do_not_overlap() -> None:
    tokens = list(range(1000))
    first, again, other = (chosen_windows(tokens, 20, 10, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique()) == 200 and bool((first.diff(dim=1) == 1).all())
    with pytest.raises(ValueError, match="1000 tokens of text, expected at least 200 x 10"):
        chosen_windows(tokens, 200, 10, 0)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.parent.glob("benchmarks/*.py")), ids=lambda path: path.stem
)
def test_every_benchmark_names_what_there_is(path: Path) -> None:
    try:
        importlib.import_module(f"benchmarks.{path.stem}")
    except ModuleNotFoundError as missing:
        if (missing.name or "").split(".")[0] in ("dsquant", "benchmarks", "tests"):
            raise
        pytest.skip(f"needs {missing.name}, which is no dependency")


def test_inputs_are_rounded_as_compressed_tensors_rounds_them() -> None:
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    generator = torch.Generator().manual_seed(0)
    inputs_RI = torch.randn(32, 64, generator=generator) * torch.exp(2 * torch.randn(64, generator=generator))
    inputs_RI[0, :16] = 0
    scale = float(inputs_RI.abs().max()) / 2 / (448 * 6)  # some blocks are out of its range
    arguments = preset_name_to_scheme("NVFP4", ["Linear"]).input_activations
    divisor = torch.tensor([1 / scale])
    scales, zeros = compute_dynamic_scales_and_zp(inputs_RI, arguments, torch.nn.Linear(1, 1), global_scale=divisor)
    theirs = fake_quantize(inputs_RI, scales, zeros, arguments, global_scale=divisor)
    assert torch.allclose(rounded(inputs_RI, scale), theirs, rtol=1e-5, atol=1e-6)
