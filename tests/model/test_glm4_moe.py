"""What GLM-4.5's files have that no other family's have; its forward and formats are in test_architectures.py."""

from pathlib import Path

import gguf as gguf_py
import pytest
import torch
from checkpoints import add_tokenizer, save_checkpoint
from gguf_files import PLAIN, tensors_of
from glm_checkpoint import GLM, glm_shapes, make_glm
from llama_cpp import every_position
from safetensors.torch import load_file

import dsquant
from dsquant.errors import InputError
from dsquant.evaluation.opening import open_candidate, open_original
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.skeleton import Skeleton

TOKENS_NT = torch.randint(6, 280, (2, 96), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GLM-4.5 with a tokenizer."""
    return add_tokenizer(make_glm(tmp_path_factory.mktemp("glm") / "model"), vocabulary=280)


def test_its_network_has_exactly_the_tensors_of_a_release(glm: Path) -> None:
    checkpoint = open_checkpoint(glm)
    assert Skeleton(checkpoint).expected_shapes() == glm_shapes(checkpoint.config)


def test_glm_4_6_leaves_out_the_tables_that_its_mtp_layer_shares(glm: Path, tmp_path: Path) -> None:
    """`model.layers.92.embed_tokens` and `shared_head.head` lie in GLM-4.5's files, and not in GLM-4.6's."""
    shared = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    tensors = {name: tensor for file in glm.glob("*.safetensors") for name, tensor in load_file(file).items()}
    kept = {name: tensor for name, tensor in tensors.items() if name not in shared}
    model = add_tokenizer(save_checkpoint(tmp_path / "model", GLM | {"torch_dtype": "bfloat16"}, kept), vocabulary=280)
    (file,) = dsquant.gguf(model, type="BF16", output=tmp_path / "out", mtp="keep", **PLAIN).folders.values()
    assert every_position(file, TOKENS_NT[:1, :8]).isfinite().all()
    without = {name: tensor for name, tensor in kept.items() if name != "model.layers.3.eh_proj.weight"}
    with pytest.raises(InputError, match=r"model\.layers\.3\.eh_proj\.weight' is missing"):
        dsquant.inspect(save_checkpoint(tmp_path / "damaged", GLM, without))


def test_a_gguf_file_says_how_far_heads_rotate_and_keeps_the_mtp_layer(glm: Path, tmp_path: Path) -> None:
    (file,) = dsquant.gguf(glm, type="F32", output=tmp_path / "out", mtp="keep", **PLAIN).folders.values()
    keys = gguf_py.GGUFReader(file).fields
    assert keys["glm4moe.rope.dimension_count"].contents() == 32 and keys["glm4moe.block_count"].contents() == 4
    assert keys["glm4moe.nextn_predict_layers"].contents() == 1
    assert tensors_of(tmp_path / "out").keys() >= {"blk.3.nextn.eh_proj.weight", "blk.0.post_attention_norm.weight"}
    assert open_original(str(file)).checkpoint.config["partial_rotary_factor"] == 0.5  # alone, from its keys


def test_a_gguf_file_that_rotates_whole_heads_is_another_model(glm: Path, tmp_path: Path) -> None:
    (file,) = dsquant.gguf(glm, type="F32", output=tmp_path / "out", **PLAIN).folders.values()
    original = open_original(str(glm))
    open_candidate(str(file), original)
    other = make_glm(tmp_path / "other", partial_rotary_factor=1.0)
    with pytest.raises(InputError, match="rope_parameters is"):
        open_candidate(str(other), original)
