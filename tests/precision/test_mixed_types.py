"""GGUF types chosen by measured sensitivity: targets are met, and what is measured is what is stored."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from checkpoints import LLAMA, add_tokenizer, full_model, make_dense, make_pico_r1
from gguf_files import CALIBRATED, decoded, tensors_of
from shapes import NARROW
from small_jobs import contents

import dsquant
from dsquant.calibration.texts import calibration_tokens, load_tokenizer
from dsquant.errors import Interrupted, UsageError
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.formats.gguf.gguf_checkpoint import read_header
from dsquant.model.gradients import head_gradients
from dsquant.model.skeleton import Skeleton
from dsquant.pipeline import job as pipeline
from dsquant.recipes import gguf_recipe

# As narrow as blocks of 256 weights allow.
ONE_LAYER = LLAMA | {
    "num_hidden_layers": 1, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico-r1 of two layers whose channels differ."""
    return add_tokenizer(
        make_pico_r1(tmp_path_factory.mktemp("small") / "model", outliers=True, **NARROW | {"hidden_size": 256})
    )


@pytest.fixture(scope="module")
def chosen(small: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It with 5 bits a weight, experts' down projections as the user wants them."""
    output = tmp_path_factory.mktemp("chosen") / "out"
    convert(small, text_file, output, target_bits=5.0, tensor_types=["ffn_down_exps=Q8_0"], mtp="keep", scales=False)
    return output


def convert(model: Path, text: Path, output: Path, **options: Any) -> Any:
    return dsquant.gguf(model, output=output, **{**CALIBRATED, "calibration": str(text), **options})


def precision(output: Path) -> dict[str, dict[str, Any]]:
    return dict(json.loads((output / "dsquant.json").read_text())["precision"])


def bits(tensors: Iterable[Any]) -> float:
    found = list(tensors)
    return float(8 * sum(int(one.n_bytes) for one in found) / sum(int(one.n_elements) for one in found))


def test_the_file_has_the_types_that_were_chosen_and_their_mean_meets_the_target(chosen: Path) -> None:
    entries, tensors = precision(chosen), tensors_of(chosen)
    for name, entry in entries.items():
        assert tensors[name].tensor_type.name == entry["width"], name
        assert tensors[name].n_bytes == entry["bytes"]
    assert 4.9 < bits(tensors[name] for name in (*entries, "blk.1.ffn_down_exps.weight")) <= 5.0
    assert len({entry["width"] for entry in entries.values()}) > 3
    assert {"token_embd.weight", "output.weight"} <= set(entries)
    kinds = {name.split(".")[-2] for name in entries}
    assert {"attn_k_b", "attn_v_b", "attn_q_a", "ffn_down", "ffn_up_exps", "ffn_gate_shexp"} <= kinds


def test_what_no_type_is_chosen_for_keeps_the_mixtures_and_the_users(chosen: Path) -> None:
    entries, tensors = precision(chosen), tensors_of(chosen)
    assert not any("ffn_down_exps" in name or name.startswith("blk.2.") for name in entries)
    assert tensors["blk.1.ffn_down_exps.weight"].tensor_type.name == "Q8_0"
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert types["blk.2.attn_q_a.weight"] == "Q4_K"  # multi-token prediction


def test_types_are_written_as_a_recipe_that_makes_the_same_tensors(
    chosen: Path, small: Path, text_file: Path, tmp_path: Path
) -> None:
    lines = (chosen / "tensor-types.txt").read_text().splitlines()
    assert "^blk\\.1\\.ffn_down_exps\\.weight$=Q8_0" in lines and not any("norm" in line for line in lines)
    convert(
        small, text_file, tmp_path / "out", tensor_types=[f"@{chosen / 'tensor-types.txt'}"], mtp="keep", scales=False
    )
    wanted, found = tensors_of(chosen), tensors_of(tmp_path / "out")
    assert all((found[name].data == tensor.data).all() for name, tensor in wanted.items())
    with pytest.raises(UsageError, match=r"missing\.txt cannot be read"):
        convert(small, text_file, tmp_path / "none", tensor_types=["@missing.txt"])


def test_it_is_called_after_its_target_not_after_the_mixture_that_it_began_with(chosen: Path) -> None:
    (file,) = chosen.glob("*-5bits.gguf")
    assert read_header(file).format == "GGUF 5bits"


def test_a_picture_shows_every_tensors_type_and_error(chosen: Path) -> None:
    picture = ElementTree.fromstring((chosen / "choice.svg").read_text())
    titles = [title.text or "" for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    told = {name: entry["width"] for name, entry in precision(chosen).items()}
    assert {title.split(": ")[0]: title.split(": ")[1].split(",")[0] for title in titles} == told


def test_it_verifies_and_tells_the_types(chosen: Path, small: Path, text_file: Path) -> None:
    assert not dsquant.verify(chosen).findings
    again = convert(
        small,
        text_file,
        chosen,
        target_bits=5.0,
        tensor_types=["ffn_down_exps=Q8_0"],
        mtp="keep",
        scales=False,
        resume=True,
    )
    assert again.already_finished and "attn_k_b" in again._repr_html_() and "of the error" in again._repr_html_()


@pytest.mark.parametrize(
    "target", [pytest.param(one, marks=pytest.mark.slow) for one in (3.5, 4.5, 6.5, "300KiB", "400KiB")]
)
def test_targets_of_bits_and_size_are_met_closely(text_file: Path, tmp_path: Path, target: Any) -> None:
    model = add_tokenizer(make_dense(tmp_path / "model", ONE_LAYER), vocabulary=290)
    is_size = isinstance(target, str)
    options = {"target_size" if is_size else "target_bits": target}
    convert(model, text_file, tmp_path / "out", scales=not is_size, **options)
    tensors = tensors_of(tmp_path / "out")
    if is_size:
        size = sum(int(tensor.n_bytes) for tensor in tensors.values())
        wanted = int(target.removesuffix("KiB")) * 2**10
        assert 0.97 * wanted < size <= wanted
    else:
        assert target - 0.15 < bits(tensors[name] for name in precision(tmp_path / "out")) <= target


def test_types_that_the_user_has_fixed_count_as_bits_of_the_decoder(text_file: Path, tmp_path: Path) -> None:
    model = add_tokenizer(make_dense(tmp_path / "model", ONE_LAYER), vocabulary=290)
    convert(model, text_file, tmp_path / "out", target_bits=5.5, tensor_types=["ffn_down=Q8_0"], scales=False)
    decoder = {name: tensor for name, tensor in tensors_of(tmp_path / "out").items() if len(tensor.shape) > 1}
    assert {tensor.tensor_type.name for name, tensor in decoder.items() if "ffn_down" in name} == {"Q8_0"}
    assert 5.2 < bits(decoder.values()) <= 5.5


@pytest.mark.slow
def test_what_is_measured_is_what_is_stored(small: Path, text_file: Path, tmp_path: Path) -> None:
    """On the first layer, with all samples in the pass."""
    options = {"samples": 2, "scales": False, "target_bits": 4.5}
    convert(small, text_file, tmp_path / "out", **options)
    tokens = calibration_tokens((str(text_file),), load_tokenizer(small), 2, 32, 0).tokens
    config, entries = json.loads((small / "config.json").read_text()), precision(tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    original = dict(open_checkpoint(small).weights)
    modules = {"attn_q_a": "self_attn.q_a_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.up_proj"}
    modules |= {"attn_k_b": "self_attn.kv_b_proj", "attn_v_b": "self_attn.kv_b_proj", "ffn_down": "mlp.down_proj"}
    wanted = hidden_states(small, original, tokens)
    last = wanted[2].detach()
    draws = [torch.Generator().manual_seed(sample) for sample in range(2)]
    skeleton, weights = Skeleton(open_checkpoint(small)), open_checkpoint(small).weights
    of_last = [head_gradients(skeleton, weights, last[[one]], generator) for one, generator in enumerate(draws)]
    gradients = torch.autograd.grad(wanted[2], wanted[:2], torch.cat(of_last))
    for part, module in modules.items():
        name, parameter = f"blk.0.{part}.weight", f"model.layers.0.{module}.weight"
        values = decoded(tensors[name])
        if module == "self_attn.kv_b_proj":
            nope = config["qk_nope_head_dim"]
            keys, rest = original[parameter].unflatten(0, (config["num_attention_heads"], -1)).split_with_sizes(
                [nope, config["v_head_dim"]], 1
            )  # fmt: skip
            parts = (values.transpose(1, 2), rest) if part == "attn_k_b" else (keys, values)
            values = torch.cat(parts, 1).flatten(0, 1)
        place = int(part.startswith("ffn"))  # attention's error counts behind attention
        change = hidden_states(small, {**original, parameter: values}, tokens)[place] - wanted[place]
        error = float((change.detach() * gradients[place]).sum(-1).square().sum()) / 2 / tokens.numel()
        assert entries[name]["error"] == pytest.approx(error, rel=0.05), name


def hidden_states(folder: Path, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> list[torch.Tensor]:
    """Behind the first layer's attention, behind that layer, and behind the second and last."""
    model: Any = full_model(folder, weights)
    found: list[torch.Tensor] = []
    first, last = model.model.layers
    first.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    for layer in (first, last):
        layer.register_forward_hook(lambda _, inputs, output: found.append(output))
    model(tokens)
    return found


@pytest.mark.slow
def test_more_bits_bring_the_model_nearer(small: Path, text_file: Path, tmp_path: Path) -> None:
    divergences = []
    for target in (3.5, 4.5, 6.5):
        folder = tmp_path / str(target)
        convert(small, text_file, folder, target_bits=target, scales=False)
        compared = dsquant.evaluate(
            small, folder, texts=[text_file], seq_len=64, samples=4, prompts="none", progress=False
        )
        divergences.append(compared.candidates[0].texts["text.txt"].mean_kl.estimate)
    assert divergences == sorted(divergences, reverse=True)


@pytest.mark.slow
def test_a_job_stopped_while_measuring_or_later_makes_the_same_bytes(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_tokenizer(make_dense(tmp_path / "model", ONE_LAYER), vocabulary=290)
    options = {"target_bits": 4.5, "split_max_size": "100KiB", "scales": False}
    convert(model, text_file, tmp_path / "whole", **options)

    def stop(*_: Any) -> None:
        raise Interrupted("here")

    for place in ("dsquant.precision.sensitivity.allocate", "dsquant.pipeline.units._run_layer"):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(place, stop)
            convert(model, text_file, tmp_path / "out", resume=True, **options)
    with monkeypatch.context() as patch:
        patch.setattr("dsquant.precision.sensitivity.measure_layer", stop)  # what was found is kept
        convert(model, text_file, tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    convert(model, text_file, tmp_path / "out", restart=True, type="Q8_0", scales=False)
    assert len(list((tmp_path / "out").glob("model-*.gguf"))) == 1
    assert not dsquant.verify(tmp_path / "out").findings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_bits": 1.0}, r"--target-bits 1.0: one of IQ1_S.* gives from \d.\d+ to 8.5 bits; ask"),
        ({"target_bits": 8.6}, "to 8.5 bits"),
        ({"target_size": "1KiB"}, r"--target-size 1.0 KiB: .* gives from .* bytes .*iB to .*iB"),
        ({"target_bits": 4.5, "target_size": "1MiB"}, "exclude each other"),
        ({"target_bits": 4.5, "calibration": "none"}, "give --calibration"),
        ({"target_bits": 4.5, "calibration": None, "imatrix": "imatrix.gguf"}, "no --imatrix"),
        ({"target_bits": 4.5, "tensor_types": [".=Q8_0"]}, "leaves no tensor to choose"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_refused_before_any_work(
    nano_r1: Path, text_file: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        dsquant.gguf(nano_r1, output=tmp_path / "out", **{**CALIBRATED, "calibration": str(text_file), **options})
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_the_target(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = gguf_recipe(
        model=str(nano_r1), type="Q4_K_M", output=tmp_path / "out", target_bits=4.5, calibration=(str(text_file),)
    )
    told = pipeline.preview(recipe)
    assert "at most 4.5 bits" in str(told) and "one of IQ3_XXS" in str(told) and not (tmp_path / "out").exists()
    by_size = pipeline.preview(recipe.model_copy(update={"target_bits": None, "target_size": 1_200_000}))
    assert by_size.output_bytes == {"gguf:1.1MiB": 1_200_000}
