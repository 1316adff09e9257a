"""What a folder is that is no model in safetensors, and what to do with it."""

from pathlib import Path

from dsquant.errors import InputError
from dsquant.files.foreign import find_file
from dsquant.files.strict_json import read_json_object
from dsquant.jobs.folder_state import WORK_FOLDER

ADAPTER = "adapter_config.json"
CONVERT = (
    "python -c \"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained('{folder}', "
    "dtype='auto').save_pretrained('{folder}-safetensors')\", then copy the tokenizer's files there"
)


def advice(folder: Path, missing: str) -> str:
    """Returns what was found where a model's file is missing, with what to do, from the files' names alone."""
    if (folder / WORK_FOLDER).is_dir():
        return "this is the output of a job that was interrupted; finish it with --resume"
    if (folder / ADAPTER).is_file():
        return (
            f"this is a LoRA adapter{_base(folder)}: merge it into its model first (peft: merge_and_unload, then "
            "save_pretrained) and name the merged model's folder"
        )
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in names if name.endswith((".bin", ".pth", ".pt")) and "training_args" not in name]
    if pickles:
        return (
            f"found {_few(pickles)}, pickles, whose loading may run code; dsquant reads safetensors only. If you trust "
            f"the files, convert them: {CONVERT.format(folder=folder)}"
        )
    files = [name for name in names if name.endswith(".gguf")]
    if files:
        return f"found {_few(files)}, which is quantized already; name the folder of the original in safetensors"
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return f"found {_few(others)} without it; download the release's {missing} too"
    inside = [name for name in names if (folder / name / "config.json").is_file()]
    if inside:
        return f"a model is in {folder / inside[0]}; name that folder"
    return "is this a model's folder?"


def _base(folder: Path) -> str:
    try:
        path = find_file(folder, ADAPTER)
        base = None if path is None else read_json_object(path).get("base_model_name_or_path")
    except InputError:
        return ""
    return f" of {base:.100}" if isinstance(base, str) else ""


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
