"""Which type each tensor gets in llama.cpp's mixtures, beside what its own quantizer chooses."""

import json
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf as gguf_py
import pytest
from checkpoints import LLAMA, R1, r1_shapes
from gguf_files import PLAIN
from glm_checkpoint import GLM

import dsquant
from dsquant.errors import UsageError
from dsquant.formats.gguf.layout import placements, stored_shape
from dsquant.formats.gguf.mixtures import choose_type, model_facts
from dsquant.formats.gguf.types import FLOAT_TYPES, MIXTURES, NEED_IMPORTANCES, TYPES, file_type_of
from dsquant.formats.table import format_of

Shapes = dict[str, tuple[int, ...]]
# Model -> mixture -> what llama-quantize chooses without an importance matrix, and with one where that differs: parts
# of a layer -> types of its tensors in order, as type*count. Made by `llama_tensor_get_type` of llama.cpp at 0c1e57098
# from the shapes below.
CHOSEN: dict[str, dict[str, list[dict[str, str]]]] = json.loads(
    (Path(__file__).parent / "llama_quantize_types.json").read_text()
)
LLAMA_70B = LLAMA | {
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192,
    "intermediate_size": 28672,
}  # fmt: skip
GLM_OF_8 = GLM | {
    "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "hidden_size": 4096,
    "n_routed_experts": 8, "first_k_dense_replace": 1,
}  # fmt: skip
R1_ALONE = R1 | {"num_nextn_predict_layers": 0}
CONFIGS = {"R1": R1_ALONE, "Llama 70B": LLAMA_70B, "GLM of 8 experts": GLM_OF_8}


@cache
def shapes_of(model: str) -> Shapes:
    """The weights of a model that are not forced to be F32."""
    config = CONFIGS[model]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config is R1_ALONE:
        named = (
            (name, shape) for name, shape in r1_shapes(config).items() if len(shape) > 1 and ".mlp.gate." not in name
        )
        return {
            place.tensor: stored_shape(shape, place, config)
            for name, shape in named
            for place in placements(name, "DeepseekV3ForCausalLM")
        }
    found: Shapes = {"token_embd.weight": (300, hidden), "output.weight": (300, hidden)}
    for layer in range(config["num_hidden_layers"]):
        query = hidden if config is LLAMA_70B else heads * 128
        parts: Shapes = {f"attn_{name}": (1024, hidden) for name in "qkv"} | {"attn_output": (hidden, query)}
        if config is LLAMA_70B:
            parts |= {"ffn_gate": (28672, hidden), "ffn_up": (28672, hidden), "ffn_down": (hidden, 28672)}
        elif layer == 0:
            parts |= {f"ffn_{name}": (hidden, 10944) for name in ("gate", "up", "down")}
        else:
            parts |= {f"ffn_{name}_exps": (8, hidden, 1408) for name in ("gate", "up", "down")}
            parts |= {f"ffn_{name}_shexp": (hidden, 1408) for name in ("gate", "up", "down")}
        found |= {f"blk.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return found


def chosen_by_llama_cpp(parts: dict[str, str]) -> dict[str, list[str]]:
    found = {}
    for names, runs in parts.items():
        types = [name for run in runs.split() for name, count in [run.split("*")] for _ in range(int(count))]
        found |= {part: types for part in names.split()}
    return found


def cases() -> Iterator[Any]:
    for model, mixtures in CHOSEN.items():
        for mixture, tables in mixtures.items():
            for has_imatrix in (False, True):
                words = f"{model}-{mixture}-{'with' if has_imatrix else 'without'}"
                yield pytest.param(model, mixture, has_imatrix, tables[-1 if has_imatrix else 0], id=words)


@pytest.mark.parametrize(("model", "mixture", "has_imatrix", "table"), [*cases()])
def test_every_tensor_gets_the_type_that_llama_quantize_gives_it(
    model: str, mixture: str, has_imatrix: bool, table: dict[str, str]
) -> None:
    config = CONFIGS[model]
    facts, found = model_facts(config, config["num_hidden_layers"], False), defaultdict(list)
    for name, shape in shapes_of(model).items():
        part = name.removesuffix(".weight").rpartition(".")[2]
        found[part].append(choose_type(name, shape, mixture, facts, has_imatrix)[0])
    assert dict(found) == chosen_by_llama_cpp(table)


def test_every_mixture_but_the_floats_and_dsquants_own_is_compared() -> None:
    assert set(MIXTURES) - set(CHOSEN["R1"]) == {*FLOAT_TYPES, "Q4_K_M+", "NVFP4"}
    assert [file_type_of(name) for name in ("IQ1_S", "IQ2_M", "Q3_K_L", "MXFP4_MOE")] == [24, 29, 13, 38]
    assert all(name in gguf_py.GGMLQuantizationType.__members__ for name in TYPES)


@pytest.mark.parametrize("options", [{"type": "IQ2_M"}, {"type": "Q8_0", "tensor_types": ["attn_output=IQ1_S"]}])
def test_types_that_need_importances_are_refused_without_before_anything_is_written(
    nano_r1: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"tensors of type IQ.* need to know .*give --calibration or --imatrix"):
        dsquant.gguf(nano_r1, output=tmp_path / "out", **PLAIN, **options)
    assert not (tmp_path / "out").exists() and "IQ2_S" in NEED_IMPORTANCES


def test_eval_reads_nvfp4_with_the_scales_beside_it(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    dsquant.gguf(nano_r1, type="NVFP4", output=tmp_path / "out", **PLAIN)
    options: dict[str, Any] = {"texts": [text_file], "seq_len": 32, "samples": 2, "prompts": "none", "progress": False}
    (found,) = dsquant.evaluate(nano_r1, tmp_path / "out", **options).candidates
    assert 0 < found.texts["text.txt"].mean_kl.estimate < 0.2


def test_an_unknown_type_is_answered_with_one_that_it_may_mean(nano_r1: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'IQ3XXS' is unknown; did you mean IQ3_XXS\?"):
        dsquant.gguf(nano_r1, output=tmp_path / "out", type="IQ3XXS", **PLAIN)


@pytest.mark.parametrize(("name", "words"), [
    ("q4_k_m", r"mean gguf:Q4_K_M\?$"), ("awqq", r"mean awq\?$"), ("gguf", r"mean gguf:Q4_K_M\?$"),
])  # fmt: skip
def test_a_format_that_lacks_its_prefix_is_recognised(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        format_of(name)
