"""Layers for multi-token prediction, announced or not, whole or in part, under whatever names."""

import json
import re
from pathlib import Path

import pytest
import torch
from layouts import assert_same_tensors, assert_same_weights, awq, complete, fused, renamed, save, small_tensors

import dsquant
from dsquant.errors import InputError
from dsquant.formats.checkpoints import open_checkpoint

MTP_PREFIXES = ("mtp.", "mtp.0.", "mtp.layers.0.", "mtp.layers.2.", "model.mtp.layers.0.")


@pytest.mark.parametrize("prefix", ["model.layers.2.", *MTP_PREFIXES])
def test_an_mtp_layer_that_nobody_announces_is_one_all_the_same(prefix: str, plain: Path, tmp_path: Path) -> None:
    tensors = renamed(small_tensors(), (r"^model\.layers\.2\.", prefix))
    model = save(tmp_path / "model", tensors, num_nextn_predict_layers=0)
    num_mtp_layers, (notice,) = complete(model)
    assert num_mtp_layers == 1 and "announces no" in notice and "hold 1" in notice
    assert open_checkpoint(model).config["num_nextn_predict_layers"] == 1
    assert_same_weights(model, plain)


def test_an_unannounced_mtp_layer_is_kept_as_the_announced_one(
    quantized: Path, text_file: Path, tmp_path: Path
) -> None:
    tensors = renamed(fused(small_tensors()), (r"^model\.layers\.2\.", "mtp.layers.0."))
    awq(save(tmp_path / "model", tensors, num_nextn_predict_layers=None), text_file, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", quantized)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_mtp_tensors_of_another_kind_are_refused_by_name_or_dropped_with_a_notice(
    text_file: Path, tmp_path: Path
) -> None:
    tensors = small_tensors(num_nextn_predict_layers=0) | {"mtp.fc.weight": torch.ones(128, 256)}
    model = save(tmp_path / "model", tensors, num_nextn_predict_layers=0)
    with pytest.raises(InputError, match=r"mtp\.fc\.weight"):
        awq(model, text_file, tmp_path / "out")
    result = dsquant.gguf(
        model, type="Q8_0", output=tmp_path / "gguf", calibration="none", evaluate=False, progress=False
    )
    assert any("layer is dropped" in warning for warning in result.warnings)


@pytest.mark.parametrize("announced", [0, 1])
@pytest.mark.parametrize("lost", ["eh_proj.weight", "mlp.experts.1.up_proj.weight"])
def test_half_an_mtp_layer_is_to_be_downloaded_again_or_dropped(announced: int, lost: str, tmp_path: Path) -> None:
    tensors = small_tensors()
    del tensors[f"model.layers.2.{lost}"]
    model = save(tmp_path / "model", tensors, num_nextn_predict_layers=announced)
    with pytest.raises(InputError, match=rf"{re.escape(lost)}.* is missing.*download.* again.*--mtp drop"):
        complete(model)
    assert complete(model, mtp="drop")[0] == 1


@pytest.mark.parametrize("mtp", ["keep", "drop"])
def test_a_decoder_layer_is_no_mtp_layer_because_the_config_counts_one_layer_less(mtp: str, tmp_path: Path) -> None:
    model = save(tmp_path / "model", small_tensors(), num_hidden_layers=1)
    with pytest.raises(InputError, match=r"model\.layers\.1\..* is not part of"):
        complete(model, mtp)
