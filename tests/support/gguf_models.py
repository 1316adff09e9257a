"""Small checkpoints with rotary embeddings of many kinds, and their GGUF files."""

from pathlib import Path
from typing import Any

from checkpoints import add_tokenizer, make_dense, make_pico_r1
from gguf_files import PLAIN

import dsquant

ONE_LAYER = {"num_hidden_layers": 1}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ATTN_FACTOR = 0.8782488562869419


def make(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    """A small random checkpoint with a tokenizer."""
    if config["model_type"] == "deepseek_v3":
        changes = {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, **changes}
        return add_tokenizer(make_pico_r1(folder, **{**config, **changes}), vocabulary=280)
    return add_tokenizer(make_dense(folder, {**config, **ONE_LAYER, **changes}), vocabulary=280)


def f32(model: Path, folder: Path) -> Path:
    """The model as a GGUF file without rounding."""
    return next(iter(dsquant.gguf(model, type="F32", output=folder, **PLAIN).folders.values()))
