"""What the tests of layouts share."""

from pathlib import Path

import pytest
import torch
from checkpoints import add_tokenizer
from layouts import CONFIG, awq, save, small_tensors


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in a release's layout; tests leave it as it is."""
    return save(tmp_path_factory.mktemp("layouts") / "plain", small_tensors())


@pytest.fixture(scope="session")
def quantized(plain: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its output."""
    output = tmp_path_factory.mktemp("layouts") / "quantized"
    awq(plain, text_file, output)
    return output


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What transformers itself saves of one random model, which it announces with an MTP layer and saves without."""
    import transformers

    folder = tmp_path_factory.mktemp("transformers")
    config = transformers.DeepseekV3Config(**{key: CONFIG[key] for key in CONFIG if key != "architectures"})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "plain")
    model.save_pretrained(folder / "fused", save_original_format=False)
    return {name: add_tokenizer(folder / name) for name in ("plain", "fused")}
