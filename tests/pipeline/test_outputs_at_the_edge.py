"""Jobs whose outputs nothing is quantized in, or searched for; and configs that an output's engine reads elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from glm_checkpoint import make_glm
from small_jobs import FAST

import dsquant
from dsquant.errors import UsageError
from dsquant.formats.mlx import Mlx

pytestmark = pytest.mark.usefixtures("imported")


@pytest.mark.slow
def test_several_gguf_types_are_made_without_calibration(nano_r1: Path, tmp_path: Path) -> None:
    to = ["gguf:Q8_0", "gguf:F16"]
    dsquant.awq(nano_r1, output=tmp_path / "out", to=to, calibration="none", mtp="drop", **FAST)
    assert set(json.loads((tmp_path / "out" / "dsquant.json").read_text())["outputs"]) == set(to)
    assert dsquant.verify(tmp_path / "out", everything=True, progress=False).ok


@pytest.mark.parametrize("to", [["compressed-tensors"], ["compressed-tensors", "mlx"]])
def test_a_target_may_leave_all_linears_as_they_are(
    nano_r1: Path, text_file: Path, tmp_path: Path, to: list[str]
) -> None:
    how: dict[str, Any] = {**FAST, "calibration": text_file, "mtp": "drop", "steps": "none", "preset": "compact"}
    dsquant.awq(nano_r1, output=tmp_path / "out", to=to, target_bits=16, **how)
    assert dsquant.verify(tmp_path / "out", everything=True, progress=False).ok


def test_what_is_no_option_of_the_command_is_none_of_the_function(tmp_path: Path) -> None:
    for unknown in ("scales_from", "imatrix", "tensor_types"):
        with pytest.raises(UsageError, match=unknown):
            dsquant.awq(output=tmp_path / "out", **{unknown: "x"})
    with pytest.raises(UsageError, match="exclude each other"):
        dsquant.awq(output=tmp_path / "out", resume=True, restart=True)


def test_mlx_states_rotary_numbers_where_mlx_lm_reads_them() -> None:
    plain = Mlx().engines_config({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert plain == {"rope_theta": 5e5, "rope_scaling": None}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "partial_rotary_factor": 0.5}
    scaled = Mlx().engines_config({"rope_parameters": yarn})
    assert scaled["rope_theta"] == 1e4 and scaled["partial_rotary_factor"] == 0.5
    assert scaled["rope_scaling"] == {"type": "yarn", "rope_type": "yarn", "factor": 40.0, "partial_rotary_factor": 0.5}
    older = Mlx().engines_config({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 40.0}})
    assert older["rope_scaling"] == {"type": "yarn", "rope_type": "yarn", "factor": 40.0}


def test_a_head_that_mlx_lm_would_not_find_is_refused(tmp_path: Path) -> None:
    model = make_glm(tmp_path / "glm")
    config = json.loads((model / "config.json").read_text())
    with pytest.raises(UsageError, match="mlx-lm's glm4_moe has neither"):
        Mlx().engines_config(config | {"tie_word_embeddings": True})
