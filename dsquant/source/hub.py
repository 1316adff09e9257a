"""Fetches a hub model's headers, config and tokenizer without its weights: a few megabytes of R1's 641 GiB."""

from pathlib import Path

from dsquant.errors import InputError
from dsquant.source.shards import DTYPES, ShardIndex, TensorInfo, tensor_bytes

SMALL_FILES = ["*.json", "tokenizer*", "*.jinja"]


def fetch_headers(model: str) -> tuple[Path, ShardIndex | None]:
    """Fetches what planning needs of a hub model; shards are read by range requests for their headers alone.

    Returns a folder with config and tokenizer, and the index of the tensors, whose weights cannot be read; None where
    the model has no safetensors weights. Raises InputError where the hub does not have the model or cannot be reached,
    or a header is damaged.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    api = HfApi()
    try:
        folder = Path(api.snapshot_download(model, allow_patterns=SMALL_FILES))
        metadata = api.get_safetensors_metadata(model)
    except NotASafetensorsRepoError:
        return folder, None
    except Exception as error:  # httpx, huggingface_hub and its parsers raise of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{model!r}: no such folder here, and the hub did not return its headers: {reason}. Check the name, the "
            "network and HF_TOKEN, or pass a local folder or a config.json."
        ) from error
    tensors = {}
    for name, file_name in metadata.weight_map.items():
        found = metadata.files_metadata[file_name].tensors.get(name)
        shape = tuple(found.shape) if found else ()
        if found is None or found.dtype not in DTYPES:
            raise InputError(f"{model}/{file_name}: tensor {name!r} is missing, or of a type that dsquant cannot read")
        begin, end = found.data_offsets
        if end - begin != tensor_bytes(found.dtype, shape):
            raise InputError(f"{model}/{file_name}: the header gives tensor {name!r} the wrong number of bytes")
        tensors[name] = TensorInfo(name, found.dtype, shape, Path(model, file_name), begin)
    return folder, ShardIndex(folder, tensors)
