"""A checkpoint that is known from its config.json alone: every tensor's name, shape and stored type, and no weight.

DeepSeek's FP8 releases store every linear of a decoder layer in blocks with one F32 scale each; norms, router,
embedding, head and what the multi-token-prediction layer adds stay in the config's own type, the router's bias in F32.
Checked against R1's release: 91,991 tensors, 688,574,839,360 bytes. Releases in 4 bits store those linears packed that
their config does not ignore.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.formats.checkpoints import stored_weights
from dsquant.formats.compressed_tensors_weights import is_target
from dsquant.kernels.values import WORD_BITS
from dsquant.model.families import FAMILIES, architecture_of
from dsquant.model.layouts import text_config
from dsquant.model.skeleton import Skeleton
from dsquant.model.structure import ROUTER_BIAS
from dsquant.pipeline.inputs import is_packed
from dsquant.schemes import Fp8Blocks
from dsquant.source.checkpoint import PACKED_SUFFIX, Checkpoint, StoredWeights, block_size
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
    method, family = quantization.get("quant_method"), FAMILIES.get(architecture_of(config))
    packed = family is not None and config.get("model_type") in family.packed_types and is_packed(config)
    if (method not in (None, "fp8") and not packed) or "bits" in quantization:
        raise InputError(
            f"{folder / 'config.json'}: describes a model that is already quantized ({method or quantization}); take "
            "the config of the FP8 or BF16 release"
        )
    block = block_size(folder, quantization)
    empty = ShardIndex(folder, {})
    skeleton = Skeleton(Checkpoint(folder, config, empty, StoredWeights(empty, block)))
    tensors = _tensors(folder, config, skeleton, block)
    if packed:
        stored_weights(empty, config)  # refuses a config that compressed-tensors would not read
        tensors = list(_packed(tensors, skeleton, quantization))
    index = ShardIndex(folder, {info.name: info for info in tensors})
    return Checkpoint(folder, config, index, stored_weights(index, config)), skeleton


def _packed(tensors: Iterable[TensorInfo], skeleton: Skeleton, quantization: Mapping[str, Any]) -> Iterator[TensorInfo]:
    """Yields tensors with those that compressed-tensors packs in the place of the linears that it does not ignore."""
    group, ignored = next(iter(quantization["config_groups"].values()))["weights"], quantization.get("ignore") or ()
    bits, size = group.get("num_bits", 4), group.get("group_size", 128)
    linears = {linear for layer in skeleton.layers for linear in layer.linears}
    for info in tensors:
        linear = info.name.removesuffix(".weight")
        if linear not in linears or any(is_target(linear, one) for one in ignored):
            yield info
            continue
        rows, columns = info.shape
        parts = (
            (PACKED_SUFFIX, "I32", (rows, -(-columns * bits // WORD_BITS))),
            ("_scale", "BF16", (rows, columns // size)),
            ("_shape", "I64", (2,)),
        )
        for suffix, dtype, shape in parts:
            yield TensorInfo(info.name + suffix, dtype, shape, info.path, 0)


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
