"""Identifies everything that a run reads besides its recipe, without reading it: a finished recipe ends at once."""

import hashlib
import json
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.packages import version
from dsquant.releases.recipe import GgufStep, ReleaseRecipe
from dsquant.source.locate import EMBEDDED_MODEL

HUB_TIMEOUT_S = 10


def inputs_of(recipe: ReleaseRecipe) -> dict[str, Any]:
    """Returns the state of the source and of every file in the recipe, as plain JSON values that differ after a change.

    The state is file sizes and times, a hub model's commit, and dsquant's version for the embedded model. Raises
    InputError where the source is neither here nor on the hub.
    """
    files = [*recipe.calibration.texts, *(recipe.evaluate.texts if recipe.evaluate else ())]
    files += [recipe.evaluate.prompts] if recipe.evaluate else []
    files += [str(step.imatrix) for step in recipe.quantize if isinstance(step, GgufStep) and step.imatrix]
    if isinstance(recipe.gates, Path):
        files.append(str(recipe.gates))
    states = {name: _file_state(Path(name)) for name in files if Path(name).is_file()}
    return {"dsquant": version("dsquant"), "source": _source_state(recipe.model), "files": states}


def _file_state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _source_state(model: str) -> Any:
    folder = Path(model).expanduser()
    if folder.is_dir():
        names = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
        return {path.name: _file_state(path) for path in names}
    if model == EMBEDDED_MODEL:
        return "embedded"
    return _hub_commit(model)


def _hub_commit(model: str) -> str:
    """Returns the commit of the hub's main branch; where the hub does not answer, the one that was downloaded last."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError

    try:
        return str(HfApi().model_info(model, timeout=HUB_TIMEOUT_S).sha)
    except HFValidationError as error:
        raise InputError(f"{model!r}: no such folder, and not a hub id such as 'deepseek-ai/DeepSeek-R1'") from error
    except Exception as error:  # httpx and huggingface_hub raise of many kinds
        fetched = Path(HF_HUB_CACHE, f"models--{model.replace('/', '--')}", "refs", "main")
        if fetched.is_file():
            return fetched.read_text().strip()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{model!r}: no such folder here, and the hub did not answer: {reason}") from error


def key_of(*parts: Any) -> str:
    """Returns the SHA-256 of plain JSON values, hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
