"""A recipe file: what a scheduled run creates from a model, and what must hold before it is published.

    model: tiny-r1
    output: releases/tiny-r1
    calibration: {texts: [r1-mix], samples: 64, seq_len: 512}
    quantize:
      - {name: awq-quality, to: [awq, compressed-tensors], preset: quality}
      - {name: q4-k-m, type: Q4_K_M}
    evaluate: {samples: 8}
    gates:
      gates:
        - {metric: mean_kl, at_most: 0.05}
    publish: symlink
    on_failure: {outputs: keep, command: 'mail -s "$DSQUANT_ERROR" team@example.org < /dev/null'}

Paths are relative to the folder in which `dsquant run` is started. Reading a recipe imports no torch.
"""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from dsquant.errors import UsageError
from dsquant.evaluation.request import Measured
from dsquant.files.disk import PARTIAL
from dsquant.files.sealing import RELEASE_FILE
from dsquant.files.strict_yaml import read_yaml
from dsquant.options import Options, Texts, options_of, problem_text
from dsquant.recipes import (
    FIRST_FIELDS,
    Calibration,
    GgufFiles,
    GgufQuantization,
    JobOptions,
    MachineOptions,
    Quantization,
    Sampling,
    without_newer_defaults,
)

# Of small letters, since some file systems take no notice of case; some drop a dot at the end as well.
NAME = r"^[a-z0-9]([a-z0-9._-]*[a-z0-9_-])?$"
# A step is a folder, and names of files next to it get endings.
LONGEST_NAME = 100
EVALUATION_FOLDER = "evaluation"
# Files and folders that a release writes next to its steps'.
OWN_NAMES = (EVALUATION_FOLDER, RELEASE_FILE)


class Part(Options):
    """A mapping of the file, whose hash is of the names that the file uses."""

    model_config = ConfigDict(serialize_by_alias=True)


class Named(Part):
    """A step, called as its folder in the output."""

    name: str = Field(
        pattern=NAME, max_length=LONGEST_NAME, description="The entry's folder in the output: a-z, 0-9, dot, - and _."
    )


class CalibrationPart(Part, Sampling):
    """What scales and importances are taken from: files, mixes or hub sets."""

    texts: Texts = Field(default=("r1-mix",), description=Calibration.model_fields["calibration"].description)


class AwqStep(Named, Quantization):
    """One `dsquant awq` run; several formats share its calibration pass."""

    @model_serializer(mode="wrap")
    def _as_in_earlier_releases(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves `steps` out where the file does, and newer fields at their defaults."""
        values = without_newer_defaults(self, handler(self), FIRST_FIELDS)
        return {name: value for name, value in values.items() if name != "steps" or name in self.model_fields_set}


class GgufStep(Named, GgufFiles, GgufQuantization):
    """One `dsquant gguf` run; `calibrate` says whether it uses the recipe's calibration."""

    calibrate: bool = Field(default=True, description="Use the file's calibration.")


class EvaluateStep(Part, Measured):
    """How every output is compared with the original; no code is generated unless prompts are named."""

    prompts: str = Field(default="none", description=Measured.model_fields["prompts"].description)

    @model_serializer(mode="wrap")
    def _without_newer_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves newer fields out at their defaults: hashes stay those of recipes without them."""
        return without_newer_defaults(self, handler(self), type(self).model_fields.keys() - {"tasks", "task_samples"})

    @model_validator(mode="after")
    def _consent(self) -> Self:
        if self.execute and not self.allow_code_execution:
            raise ValueError(
                "execute runs code that a language model wrote on this machine, in a process with limits that are "
                "not a security boundary; add allow_code_execution: true if you mean it"
            )
        if self.allow_code_execution and not self.execute:
            raise ValueError("allow_code_execution does nothing without execute: true")
        if self.execute and self.prompts == "none":
            raise ValueError("execute needs prompts to complete, such as prompts: python")
        return self


class OnFailure(Part):
    """What happens when the run fails."""

    outputs: Literal["keep", "remove"] = Field(
        default="keep", description="Keep what is finished, so that the next run continues from there, or remove it."
    )
    command: str | None = Field(
        default=None,
        description="A shell command, with DSQUANT_RECIPE, DSQUANT_OUTPUT, DSQUANT_STAGE, DSQUANT_ERROR and "
        "DSQUANT_EXIT_CODE in its environment.",
    )


# Key of an entry -> what it makes of it. Each entry has one of them, whatever the field's own default.
KINDS = {"to": "awq", "type": "gguf"}


def _kind(step: Any) -> str:
    """Tells what a step of `quantize` is; of neither kind where it names neither or both of `to` and `type`."""
    if isinstance(step, dict):
        named = [kind for key, kind in KINDS.items() if step.get(key) is not None]
        return named[0] if len(named) == 1 else "unclear"
    return "gguf" if isinstance(step, GgufStep) else "awq"


Step = Annotated[Annotated[AwqStep, Tag("awq")] | Annotated[GgufStep, Tag("gguf")], Discriminator(_kind)]
# Nothing of the published bytes depends on these.
WITHOUT_INFLUENCE = ("output", "memory_budget", "gpu_memory_budget", "publish", "on_failure")


class ReleaseRecipe(Part, MachineOptions):
    """A whole recipe."""

    model: str = Field(default="tiny-r1", description=JobOptions.model_fields["model"].description)
    output: Path = Field(description="Folder to publish in.")
    calibration: CalibrationPart = Field(default=CalibrationPart(), description="Texts that all entries share.")
    quantize: tuple[Step, ...] = Field(min_length=1, description="The entries: what to create, in order.")
    evaluate: EvaluateStep | None = Field(
        default=None, description="Compare every output with the original; an empty mapping takes all defaults."
    )
    gates: dict[str, Any] | Path | None = Field(
        default=None, description="Limits that decide what is published, or the file that holds them."
    )
    publish: Literal["rename", "symlink"] = Field(
        default="rename",
        description="rename makes OUTPUT itself the result, at once; symlink keeps every result under OUTPUT/releases "
        "and points OUTPUT/current to the last.",
    )
    on_failure: OnFailure = Field(default=OnFailure(), description="What happens when the run fails.")

    @field_validator("quantize")
    @classmethod
    def _distinct(cls, steps: tuple[AwqStep | GgufStep, ...]) -> tuple[AwqStep | GgufStep, ...]:
        names = [step.name for step in steps]
        taken = next((name for name in names if name.removesuffix(PARTIAL) in OWN_NAMES), None)
        if taken is not None:
            raise ValueError(f"a step cannot be called {taken}: the release itself writes {', '.join(OWN_NAMES)}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"give every step a name of its own; {', '.join(twice)} is there twice")
        return steps

    @model_validator(mode="after")
    def _gates_need_an_evaluation(self) -> Self:
        if self.gates is not None and self.evaluate is None:
            raise ValueError("gates need an evaluate section: nothing would be measured")
        return self

    @property
    def hash(self) -> str:
        """SHA-256 of everything that determines the published bytes, hexadecimal."""
        content = self.model_dump(mode="json", exclude=set(WITHOUT_INFLUENCE))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_recipe(path: Path, model: str | None = None, output: Path | None = None) -> ReleaseRecipe:
    """Reads and checks a recipe in YAML; `model` and `output` replace the recipe's. Raises InputError where the file is
    missing or is not YAML, UsageError, with the key's path, where a key is unknown or a value is not allowed."""
    content = read_yaml(path, "recipe")
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a recipe is a mapping with model, output and quantize, found {content!r:.80}")
    content |= {"model": model} if model else {}
    content |= {"output": str(output)} if output else {}
    try:
        recipe = ReleaseRecipe.model_validate(content)
    except ValidationError as error:
        # A step that is wrong makes pydantic complain of too few steps as well.
        found = error.errors()
        steps = [problem for problem in found if problem["loc"][:1] == ("quantize",) and len(problem["loc"]) > 1]
        found = [problem for problem in found if not (steps and problem["type"] == "too_short")]
        raise UsageError(f"{path}: {'; '.join(_problem(problem) for problem in found)}") from error
    return recipe


def _problem(problem: Any) -> str:
    """Tells one problem, with the key's path as the file has it."""
    kinds = ("awq", "gguf")
    where = tuple(part for part in problem["loc"] if part not in kinds or problem["loc"][0] != "quantize")
    if problem["type"] == "union_tag_invalid":
        found = f"{', '.join(map(str, problem['input'])):.200}"
        words = f"a step has either `to` (formats of an AWQ step) or `type` (of a GGUF step), not both; found {found}"
        problem = {**problem, "msg": words}
    elsewhere = _places_of(str(where[-1])) if problem["type"] == "extra_forbidden" else {}
    here = options_of(_part_at(problem["loc"])) if elsewhere else {}
    if elsewhere and not difflib.get_close_matches(str(where[-1]).replace("-", "_"), here, n=1, cutoff=0.9):
        problem = {**problem, "type": "misplaced", "msg": f"not a key here; it stands in {' or '.join(elsewhere)}"}
    return problem_text(problem, _part_at(problem["loc"]), where or ("recipe",))


def _places_of(key: str) -> dict[str, type[Part]]:
    """Finds the mappings of a recipe that have a key, by what they are called."""
    mappings: dict[str, type[Part]] = {
        "the file itself": ReleaseRecipe,
        "`calibration`": CalibrationPart,
        "an entry with `to`": AwqStep,
        "an entry with `type`": GgufStep,
        "`evaluate`": EvaluateStep,
        "`on_failure`": OnFailure,
    }
    return {place: mapping for place, mapping in mappings.items() if key.replace("-", "_") in options_of(mapping)}


def _part_at(location: tuple[Any, ...]) -> type[Part]:
    """Finds the mapping that a key is in."""
    if location[:1] == ("quantize",):
        return GgufStep if "gguf" in location else AwqStep
    parts: dict[Any, type[Part]] = {"calibration": CalibrationPart, "evaluate": EvaluateStep, "on_failure": OnFailure}
    return parts[location[0]] if len(location) > 1 and location[0] in parts else ReleaseRecipe
