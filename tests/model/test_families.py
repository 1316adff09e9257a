"""A family owns what is particular to an architecture: nobody else reads its keys; gguf-py agrees with its names."""

import re
from pathlib import Path

import pytest
from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

from dsquant.errors import InputError
from dsquant.model.families import FAMILIES, family_of
from dsquant.model.families.family import Family

PACKAGE = Path(__file__).parents[2] / "dsquant"
PARTICULAR = re.compile(
    r"kv_lora_rank|q_lora_rank|qk_\w+_head_dim|v_head_dim|n_(routed|shared)_experts|first_k_dense_replace|"
    r"moe_intermediate_size|num_experts_per_tok|num_nextn_predict|[A-Z]\w+[0-9]\w*ForCausalLM|"
    r"== .(deepseek2|llama|qwen)"
)


def test_deepseek_v4_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"DeepseekV4ForCausalLM' is not supported; its experts are released in 4 bits"
    ):
        family_of(tmp_path, {"architectures": ["DeepseekV4ForCausalLM"]})


# llama.cpp reads it, and its own package of 0.19 does not list it.
NOT_IN_GGUF_PY = ("deepseek32",)


def test_what_is_particular_to_an_architecture_stands_in_families_alone() -> None:
    others = [file for file in PACKAGE.rglob("*.py") if file.parent.name != "families"]
    found = {file.name: match[0] for file in others if (match := PARTICULAR.search(file.read_text()))}
    assert not found


def test_readmes_table_of_architectures_is_what_the_families_say() -> None:
    rows = [
        f"| {family.releases} | `{family.architecture}` | {'`quality`, ' if family.mixture else ''}`compact`, `best` "
        f"| `{family.gguf.architecture}` |"
        for family in sorted(FAMILIES.values(), key=lambda family: family.mixture is None)
    ]
    table = "\n".join(
        ["| models | `architectures` in config.json | presets | in GGUF |", "|---|---|---|---|", *rows, ""]
    )
    assert table in PACKAGE.with_name("README.md").read_text(), f"README should have\n{table}"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.gguf.architecture)
def test_gguf_py_knows_every_tensor_of_a_family(family: Family) -> None:
    facts = family.gguf
    if facts.architecture in NOT_IN_GGUF_PY:
        return
    (number,) = (number for number, name in MODEL_ARCH_NAMES.items() if name == facts.architecture)
    known = {TENSOR_NAMES[tensor].removeprefix("blk.{bid}.") for tensor in MODEL_TENSORS[number]}
    split = {facts.split.keys, facts.split.values} if facts.split else set()
    # llama.cpp's deepseek2 reads MTP layers, which gguf-py's list for it does not have.
    unknown = {*facts.modules.values(), *split} - known
    assert all(name.startswith("nextn.") and facts.architecture == "deepseek2" for name in unknown)
