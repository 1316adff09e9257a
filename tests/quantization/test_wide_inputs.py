"""Inputs too wide for a Gram matrix of each linear's own: errors are compensated all the same (docs/decisions/0018)."""

import json
from pathlib import Path

import forked
import pytest
import torch
from checkpoints import QWEN2, add_tokenizer, make_dense, make_pico_r1
from ranks import command, finish, start
from shapes import NARROW
from small_jobs import contents

import dsquant
from dsquant.precision import layer_errors as sensitivity
from dsquant.quantization import layer_mlps, statistics
from dsquant.quantization.clip import clipped_weight
from dsquant.quantization.compensate import compensated_weight, with_inverses
from dsquant.quantization.statistics import FACTOR_ROWS, InputMoments, InputStatistics, part_width
from dsquant.schemes import Grid

GRID = Grid(4, 64, True)
# 17 blocks of 128: wider than a Gram matrix of each expert's own.
HIDDEN = 2176


def _inputs(num_tokens: int, num_features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    mixing_II = torch.randn(num_features, num_features, generator=generator) / num_features**0.5
    return torch.randn(num_tokens, num_features, generator=generator) @ mixing_II


def _weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4))


def _moments(inputs_RI: torch.Tensor) -> InputMoments:
    found = InputStatistics(inputs_RI.shape[1], seed=0, compensated=True)
    for part_RI in inputs_RI.split(300):
        found.add(part_RI)
    return found.moments()


@pytest.mark.parametrize(
    ("features", "width"),
    [(7168, 7168), (8192, 8192), (16384, 8192), (18432, 6144), (28672, 7168), (29568, 4224), (8292, 8292)],
)
def test_parts_are_equal_whole_blocks_and_as_wide_as_may_be(features: int, width: int) -> None:
    assert part_width(features) == width


def test_wide_inputs_in_one_part_are_rounded_as_narrow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs_RI, weight_OI = _inputs(FACTOR_ROWS, 256), _weight(40, 256)
    narrow = compensated_weight(weight_OI, GRID, _moments(inputs_RI))
    monkeypatch.setattr(statistics, "WIDEST_GRAM", 128)
    moments = _moments(inputs_RI)
    assert moments.gram_II is None
    wide = compensated_weight(weight_OI, GRID, moments)
    assert torch.equal(wide.codes_OI, narrow.codes_OI)
    assert torch.equal(wide.scales_OG, narrow.scales_OG)


def test_errors_are_compensated_inside_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "WIDEST_GRAM", 128)
    monkeypatch.setattr(statistics, "WIDEST_PART", 256)
    inputs_RI, weight_OI = _inputs(1500, 512), _weight(40, 512)
    scales_I = torch.linspace(0.5, 2, 512)
    moments = _moments(inputs_RI * scales_I).divided(scales_I)
    assert len(with_inverses(moments, GRID).inverses) == 2

    def error(found: torch.Tensor) -> float:
        return float(((found - weight_OI) @ inputs_RI.T).square().sum())

    compensated, clipped = (
        rounded(weight_OI, GRID, moments).dequantize() for rounded in (compensated_weight, clipped_weight)
    )
    assert error(compensated) < 0.75 * error(clipped)
    # a part is rounded as it would be with no other beside it
    alone = compensated_weight(weight_OI[:, :256], GRID, _moments(inputs_RI[:, :256])).dequantize()
    rows_O = ~(compensated == clipped).all(1)
    assert rows_O.float().mean() > 0.9
    assert ((alone - compensated[:, :256]).abs() < 1e-6)[rows_O].float().mean() > 0.99


def test_nothing_is_compensated_where_nobody_asked_for_it() -> None:
    inputs_RI, weight_OI = torch.randn(64, HIDDEN), torch.randn(8, HIDDEN)
    unasked = InputStatistics(HIDDEN, seed=0)
    unasked.add(inputs_RI)
    found = compensated_weight(weight_OI, GRID, unasked.moments())
    assert torch.equal(found.codes_OI, clipped_weight(weight_OI, GRID, unasked.moments()).codes_OI)


def test_chunks_of_wide_inputs_add_up_to_their_gram_matrix() -> None:
    inputs_RI = torch.randn(700, HIDDEN)
    total = InputStatistics(HIDDEN, seed=0, compensated=True)
    for chunk_RI in inputs_RI.split(300):
        chunk = InputStatistics(HIDDEN, seed=1, compensated=True)
        chunk.add(chunk_RI)
        total.merge(chunk)
    parts_PWW = total.moments().parts_PWW
    assert parts_PWW is not None
    assert torch.allclose(parts_PWW[0], inputs_RI.T @ inputs_RI / 700, atol=1e-4)


def _wide(folder: Path, **shape: int) -> Path:
    """A dense layer and a mixture layer."""
    return add_tokenizer(make_pico_r1(folder, **{"num_hidden_layers": 2, "num_nextn_predict_layers": 0, **shape}))


# What is wide is a constant: tests of the whole path lower it, and one of them, slow, has inputs as wide as that.
WIDTHS = [
    (HIDDEN, {"hidden_size": HIDDEN}),
    (255, NARROW | {"hidden_size": 256}),
]


def _share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up are only clipped, as before they shared a Gram matrix."""
    for module in (layer_mlps, sensitivity):
        monkeypatch.setattr(module, "shared_inverses", lambda job, norm_scales: [() for _ in norm_scales])


@pytest.mark.slow
@pytest.mark.parametrize(("widest", "shape"), WIDTHS)
def test_what_mlps_share_and_attention_keeps_lowers_the_errors_of_a_wide_mixture(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, widest: int, shape: dict[str, int]
) -> None:
    wide, errors = _wide(tmp_path / "model", **shape), {}
    monkeypatch.setattr(statistics, "WIDEST_GRAM", min(widest, statistics.WIDEST_GRAM))
    for kind in ("compensated", "clipped"):
        if kind == "clipped":
            _share_nothing(monkeypatch)
            monkeypatch.setattr("dsquant.quantization.sharing.WIDEST_PART", 0)
        output = tmp_path / kind
        dsquant.awq(
            wide, output=output, preset="compact", to="compressed-tensors", calibration=str(text_file),
            steps="clip,compensate", samples=12, seq_len=128, group_size=64, evaluate=False, progress=False,
        )  # fmt: skip
        assert not dsquant.verify(output, progress=False).findings
        grids = [one["grids"][0] for one in json.loads((output / "dsquant.json").read_text())["layers"]]
        errors[kind] = [(grid["attention_error"], grid["mlp_error"]) for grid in grids]
    for (attention, mlp), (clipped_attention, clipped_mlp) in zip(*errors.values(), strict=True):
        assert attention < 0.9 * clipped_attention
        assert mlp < 0.6 * clipped_mlp


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [HIDDEN, 256])
def test_a_wide_dense_model_chooses_widths_by_compensated_errors(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: int
) -> None:
    monkeypatch.setattr(statistics, "WIDEST_GRAM", min(hidden - 1, statistics.WIDEST_GRAM))
    model = add_tokenizer(
        make_dense(tmp_path / "model", {**QWEN2, "num_hidden_layers": 1, "hidden_size": hidden, "vocab_size": 320})
    )
    errors = {}
    for kind in ("compensated", "clipped"):
        if kind == "clipped":
            _share_nothing(monkeypatch)
        result = dsquant.awq(
            model, output=tmp_path / kind, to="compressed-tensors", calibration=str(text_file),
            steps="clip,compensate", target_bits=5.0, samples=4, seq_len=64, group_size=64, evaluate=False,
            progress=False,
        )  # fmt: skip
        assert not dsquant.verify(result.output, progress=False).findings
        chosen = json.loads((result.output / "dsquant.json").read_text())["precision"]
        errors[kind] = {name: group["errors"]["4"] for name, group in chosen.items()}
    lower = [name for name, error in errors["compensated"].items() if error < 0.8 * errors["clipped"][name]]
    assert lower and all("mlp" in name for name in lower)


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["clip,compensate", "follow,clip,compensate"])
def test_two_ranks_write_the_bytes_of_one_for_a_wide_mixture(steps: str, text_file: Path, tmp_path: Path) -> None:
    wide = _wide(tmp_path / "model", hidden_size=HIDDEN)
    more = ("--preset", "compact", "--to", "awq", "--steps", steps)
    forked.finish(*command(wide, text_file, tmp_path / "one", *more))
    finish(start(2, wide, text_file, tmp_path / "two", *more))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
