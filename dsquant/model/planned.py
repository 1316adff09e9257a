"""A checkpoint that is known from its config.json alone: every tensor's name, shape and stored type, and no weight.

DeepSeek's FP8 releases store every linear of a decoder layer in blocks with one F32 scale each; norms, router,
embedding, head and what the multi-token-prediction layer adds stay in the config's own type, the router's bias in F32.
Checked against R1's release: 91,991 tensors, 688,574,839,360 bytes.
"""

from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.model.layouts import text_config
from dsquant.model.skeleton import Skeleton
from dsquant.model.structure import ROUTER_BIAS
from dsquant.schemes import Fp8Blocks
from dsquant.source.checkpoint import Checkpoint, StoredWeights, block_size
from dsquant.source.fp8_blocks import SCALE_SUFFIX
from dsquant.source.shards import ShardIndex, TensorInfo

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def planned_checkpoint(folder: Path, config: dict[str, Any]) -> tuple[Checkpoint, Skeleton]:
    """Returns the checkpoint that a config describes, with names and shapes but no weight to read, and its network.

    A tokenizer in `folder` is used. Raises InputError where the architecture is not supported, or the checkpoint is
    quantized otherwise than to FP8.
    """
    config = text_config(folder, config)
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method not in (None, "fp8") or "bits" in quantization:
        raise InputError(
            f"{folder / 'config.json'}: describes a model that is already quantized ({method or quantization}); take "
            "the config of the FP8 or BF16 release"
        )
    block = block_size(folder, quantization)
    empty = ShardIndex(folder, {})
    skeleton = Skeleton(Checkpoint(folder, config, empty, StoredWeights(empty, block)))
    index = ShardIndex(folder, {info.name: info for info in _tensors(folder, config, skeleton, block)})
    return Checkpoint(folder, config, index, StoredWeights(index, block)), skeleton


def _tensors(
    folder: Path, config: dict[str, Any], skeleton: Skeleton, block: tuple[int, int] | None
) -> list[TensorInfo]:
    dtype = DTYPES.get(str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"), "BF16")
    linears = {f"{linear}.weight" for layer in skeleton.layers for linear in layer.linears}
    linears |= {f"{layer.prefix}.{module}.weight" for layer in skeleton.layers for module in skeleton.family.in_fp8}
    path = folder / "config.json"
    tensors = []
    for name, shape in skeleton.expected_shapes().items():
        if block is not None and name in linears:
            tensors.append(TensorInfo(name, "F8_E4M3", shape, path, 0))
            scales = Fp8Blocks(*block).scale_shape((shape[0], shape[1]))
            tensors.append(TensorInfo(name + SCALE_SUFFIX, "F32", scales, path, 0))
        else:
            tensors.append(TensorInfo(name, "F32" if name.endswith(ROUTER_BIAS) else dtype, shape, path, 0))
    return tensors
