"""Locates a model: the embedded tiny-r1, a local folder, or a hub id."""

import re
from difflib import get_close_matches
from pathlib import Path

from dsquant.errors import InputError

EMBEDDED_MODEL = "tiny-r1"
ASSETS = Path(__file__).parent.parent / "assets"
HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "tokenizer*",
    "*.model",
    "*.jinja",
    "README.md",
    "LICENSE",
]


def locate(model: str) -> Path:
    """Returns a model's folder, downloading it where `model` is a hub id such as `deepseek-ai/DeepSeek-R1`. Raises
    InputError where there is no such folder and no such hub model, or the hub cannot be reached."""
    if model == EMBEDDED_MODEL and not Path(model).is_dir():
        return ASSETS / EMBEDDED_MODEL
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise InputError(_no_folder(folder))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or any(set(part) == {"."} for part in model.split("/")):
        kind = "file" if model.endswith(".gguf") else "folder"
        found, hub_id = f"no such {kind}{_beside(folder)}", model.removeprefix("https://huggingface.co/")
        example = hub_id if hub_id != model else "deepseek-ai/DeepSeek-R1"
        raise InputError(f"{model!r}: {found}, and not a hub id such as {example!r}")
    return _download(model)


def _no_folder(file: Path) -> str:
    if file.suffix == ".gguf":
        return f"{file}: a GGUF file is quantized already; name the folder of the original in safetensors"
    return f"{file}: a model is a folder, with config.json, tokenizer and weights; name {file.absolute().parent}"


def _beside(folder: Path) -> str:
    """Returns which folders are where one is missing, in words."""
    names = sorted(path.name for path in folder.parent.glob("[!.]*/")) if folder.parent.is_dir() else []
    names = get_close_matches(folder.name, names) or names
    return f" ({folder.parent} holds {', '.join(names[:5])})" if names else ""


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{model!r}: no such folder here{_beside(Path(model))}, and the hub did not return it: {reason}. "
            "Check the name, the network and HF_TOKEN, or pass a local folder."
        ) from error
