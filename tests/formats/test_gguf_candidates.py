"""A GGUF file beside a reference: its keys and tensors say the same network, or it is refused."""

import json
from pathlib import Path
from typing import Any

import gguf as gguf_py
import pytest
import torch
from checkpoints import LLAMA, PICO_R1
from gguf_files import with_keys
from gguf_models import f32, make

from dsquant.errors import InputError
from dsquant.evaluation.opening import Original, open_candidate, open_original


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Original, Path]:
    """A small mixture as reference, and its GGUF file."""
    folder = tmp_path_factory.mktemp("mixture")
    model = make(folder / "model", PICO_R1)
    return open_original(str(model)), f32(model, folder / "out")


def test_weights_that_are_decoded_ahead_are_those_that_are_decoded_when_they_are_needed(
    mixture: tuple[Original, Path],
) -> None:
    original, file = mixture
    plain, ahead = (open_candidate(str(file), original).weights for _ in range(2))
    names = list(plain)
    assert ahead.prefetch([*names, "no such"]) == sum(4 * plain[name].numel() for name in names)
    assert all(torch.equal(ahead[name], plain[name]) for name in names)


CHANGED_KEYS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "base": ({"deepseek2.rope.freq_base": 5000.0}, (), r"rope\.freq_base' is 5000\.0, .* needs 10000\.0"),
    "factor": ({"deepseek2.rope.scaling.factor": 4.0}, (), r"rope\.scaling\.factor' is 4\.0, .* needs 8\.0"),
    "no scaling": ({"deepseek2.rope.scaling.type": "none"}, (), r"rope\.scaling\.type' is 'none', .* needs 'yarn'"),
    "no multiplier": (
        {},
        ("deepseek2.rope.scaling.yarn_log_multiplier",),
        r"yarn_log_multiplier' is None, .* needs 0\.1",
    ),
    "magnitude": ({"deepseek2.rope.scaling.attn_factor": 0.5}, (), r"attn_factor' is 0\.5, .* needs None"),
    "epsilon": ({"deepseek2.attention.layer_norm_rms_epsilon": 1e-5}, (), "layer_norm_rms_epsilon"),
    "experts of a token": ({"deepseek2.expert_used_count": 1}, (), "expert_used_count' is 1, .* needs 2"),
    "scale of experts": ({"deepseek2.expert_weights_scale": 1.0}, (), r"expert_weights_scale' is 1\.0, .* needs 2\.5"),
    "norm of shares": ({}, ("deepseek2.expert_weights_norm",), "expert_weights_norm' is False, .* needs True"),
    "no groups": ({}, ("deepseek2.expert_group_count",), "expert_group_count' is 1, .* needs 4"),
    "softmax": ({"deepseek2.expert_gating_func": 1}, (), "expert_gating_func' is 1, .* needs 2"),
    "heads": ({"deepseek2.attention.head_count": 2}, (), "attention.head_count' is 2, .* needs 4"),
    "head width": ({"deepseek2.attention.key_length_mla": 96}, (), "key_length_mla' is 96, .* needs 128"),
    "dense layers": ({"deepseek2.leading_dense_block_count": 2}, (), "leading_dense_block_count' is 2"),
    "layers": ({"deepseek2.block_count": 1}, (), "block_count' is 1, .* needs 2"),
    "temperature": ({"deepseek2.attention.temperature_scale": 0.5}, (), "temperature_scale' is 0.5"),
    "unknown scaling": ({"deepseek2.rope.scaling.type": "su"}, (), "describe no rotary embedding"),
}


@pytest.mark.parametrize("name", CHANGED_KEYS)
def test_a_candidate_whose_keys_say_another_network_is_refused(
    mixture: tuple[Original, Path], tmp_path: Path, name: str
) -> None:
    original, file = mixture
    changes, without, message = CHANGED_KEYS[name]
    with pytest.raises(InputError, match=message):
        open_candidate(str(with_keys(file, tmp_path / "changed.gguf", changes, without)), original)


def test_keys_that_change_nothing_are_accepted(mixture: tuple[Original, Path], tmp_path: Path) -> None:
    original, file = mixture
    open_candidate(str(file), original)
    beside = {"deepseek2.context_length": 8192, "deepseek2.rope.scaling.yarn_beta_fast": 8.0}
    open_candidate(str(with_keys(file, tmp_path / "beside.gguf", beside)), original)


def test_linear_scaling_of_a_file_is_read_where_it_is_the_reference(tmp_path: Path) -> None:
    model = make(tmp_path / "model", LLAMA | {"rope_scaling": {"type": "linear", "factor": 4}})
    file = f32(model, tmp_path / "out")
    original = open_original(str(file))
    assert original.skeleton.config["rope_parameters"]["factor"] == 4.0
    open_candidate(str(model), original)  # and the checkpoint is the same network
    untyped = with_keys(file, tmp_path / "untyped.gguf", {}, ("llama.rope.scaling.type",))  # llama.cpp takes linear
    open_candidate(str(untyped), original)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    with pytest.raises(InputError, match="rope_parameters is"):
        open_candidate(str(model), original)


def with_tensor(file: Path, copy: Path, name: str, shape: tuple[int, ...]) -> Path:
    """Copies a GGUF file with one tensor more."""
    reader = gguf_py.GGUFReader(with_keys(file, copy, {}))
    writer = gguf_py.GGUFWriter(copy.with_suffix(".more.gguf"), reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            element = field.types[-1] if field.types[0] == gguf_py.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=element)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor(name, torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy.with_suffix(".more.gguf")


def test_a_candidate_with_a_tensor_that_the_reference_lacks_is_refused(
    like_r1_0528: tuple[Path, Path], tmp_path: Path
) -> None:
    model, file = like_r1_0528
    original = open_original(str(model))
    for name, shape in (("blk.0.attn_q.bias", (256,)), ("output.weight", (300, 256))):
        with pytest.raises(InputError, match=f"{name}' is not part of the network"):
            open_candidate(str(with_tensor(file, tmp_path / f"{name}.gguf", name, shape)), original)
