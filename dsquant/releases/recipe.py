"""A recipe file: what a scheduled run makes of a model, and what has to hold before it is published.

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
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from dsquant.errors import UsageError
from dsquant.files.disk import PARTIAL
from dsquant.files.sealing import RELEASE_FILE
from dsquant.files.strict_yaml import read_yaml
from dsquant.recipes import Preset, StepNames, parse_size

# Of small letters, since some file systems take no notice of case; some drop a dot at the end as well.
NAME = r"^[a-z0-9]([a-z0-9._-]*[a-z0-9_-])?$"
# A step is a folder, and file names beside it get endings.
LONGEST_NAME = 100
EVALUATION_FOLDER = "evaluation"
# What a release writes beside its steps' folders.
OWN_NAMES = (EVALUATION_FOLDER, RELEASE_FILE)


def _size(value: Any) -> Any:
    """Sizes may be written as 16GiB."""
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except UsageError as error:
        raise ValueError(str(error)) from error


def _listed(value: Any) -> Any:
    """One text may be written without brackets."""
    return [value] if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(_size)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class Part(BaseModel):
    """A mapping of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(Part):
    """What scales and importances are taken from.

    Attributes:
        texts: files, mixes or hub sets.
        samples: how many.
        seq_len: tokens of each.
        seed: of the choice of texts.
    """

    texts: Texts = ("r1-mix",)
    samples: int = Field(default=64, ge=1)
    seq_len: int = Field(default=512, ge=8)
    seed: int = Field(default=0, ge=0)


class AwqStep(Part):
    """One `dsquant awq` run; several formats share its calibration pass.

    Attributes:
        name: its folder in the output.
        to: formats.
        bits: of a weight.
        target_bits: mean stored bits; widths are chosen by measured sensitivity.
        target_size: the same, for the size of all tensors.
        group_size: input channels that share a scale.
        symmetric: without zero points; None takes what the formats' engines want.
        preset: quality, compact or best.
        steps: of the quantization; None takes the preset's.
        mtp: keep, quantize or drop the multi-token-prediction layer.
        max_shard_size: of one file.
    """

    name: str = Field(pattern=NAME, max_length=LONGEST_NAME)
    to: Texts
    bits: Literal[3, 4, 8] = 4
    target_bits: float | None = Field(default=None, gt=0, le=32)
    target_size: Size | None = Field(default=None, ge=1)
    group_size: Literal[32, 64, 128] = 128
    symmetric: bool | None = None
    preset: Preset | None = None
    # Left out of the hash where it is left out of the file, as in releases from before there were steps.
    steps: StepNames | None = Field(default=None, exclude_if=lambda steps: steps is None)
    mtp: Literal["keep", "quantize", "drop"] = "keep"
    max_shard_size: Size = Field(default=5 * 2**30, ge=1)


class GgufStep(Part):
    """One `dsquant gguf` run.

    Attributes:
        name: its folder in the output.
        type: a type or mixture of llama.cpp; with a target, of what no type is chosen for.
        target_bits: mean stored bits of the decoder's weights; their types are chosen by measured sensitivity.
        target_size: the same, for the size of all tensors.
        tensor_types: overrides REGEX=TYPE.
        imatrix: importances from a file, instead of calibration.
        calibrate: whether importances and scales are taken from the recipe's calibration.
        scales: whether AWQ's scales are folded in.
        mtp: keep or drop the multi-token-prediction layer.
        split_max_size: of one file; 0 makes one.
    """

    name: str = Field(pattern=NAME, max_length=LONGEST_NAME)
    type: str
    target_bits: float | None = Field(default=None, gt=0, le=32)
    target_size: Size | None = Field(default=None, ge=1)
    tensor_types: Texts = ()
    imatrix: Path | None = None
    calibrate: bool = True
    scales: bool = True
    mtp: Literal["keep", "drop"] = "drop"
    split_max_size: Size = Field(default=0, ge=0)


class EvaluateStep(Part):
    """How every output is compared with the original.

    Attributes:
        texts: text files; the shipped held-out texts where there are none.
        samples: of each text.
        seq_len: tokens of each.
        prompts: code to complete: `python` (shipped), a .jsonl file, or `none`.
        max_tokens: of a completion.
        execute: whether completions are run with the prompts' tests: code that a model wrote runs on this machine,
            under limits that are no security boundary.
        allow_code_execution: the author's word that it may.
    """

    texts: Texts = ()
    samples: int = Field(default=8, ge=1)
    seq_len: int = Field(default=512, ge=8)
    prompts: str = "none"
    max_tokens: int = Field(default=64, ge=1)
    execute: bool = False
    allow_code_execution: bool = False

    @model_validator(mode="after")
    def _consent(self) -> Self:
        if self.execute and not self.allow_code_execution:
            raise ValueError(
                "execute runs code that a language model wrote on this machine, in a process with limits that are no "
                "security boundary; add allow_code_execution: true if you mean it"
            )
        if self.allow_code_execution and not self.execute:
            raise ValueError("allow_code_execution does nothing without execute: true")
        if self.execute and self.prompts == "none":
            raise ValueError("execute needs prompts to complete, such as prompts: python")
        return self


class OnFailure(Part):
    """What happens when the run fails.

    Attributes:
        outputs: keep what was made, so that the next run goes on from there, or remove it.
        command: a shell command, with DSQUANT_RECIPE, DSQUANT_OUTPUT, DSQUANT_STAGE, DSQUANT_ERROR and
            DSQUANT_EXIT_CODE in its environment.
    """

    outputs: Literal["keep", "remove"] = "keep"
    command: str | None = None


def _kind(step: Any) -> str:
    """What a step of `quantize` is."""
    if isinstance(step, dict):
        if "type" in step and "to" in step:
            return "both"  # no kind; the refusal says so
        return "gguf" if "type" in step and "to" not in step else "awq"
    return "gguf" if isinstance(step, GgufStep) else "awq"


Step = Annotated[Annotated[AwqStep, Tag("awq")] | Annotated[GgufStep, Tag("gguf")], Discriminator(_kind)]
# Nothing of the published bytes depends on these.
WITHOUT_INFLUENCE = ("output", "memory_budget", "gpu_memory_budget", "publish", "on_failure")


class ReleaseRecipe(Part):
    """A whole recipe.

    Attributes:
        model: a folder, a hub id, or `tiny-r1`.
        output: where the result is published.
        calibration: shared by all steps.
        quantize: the outputs to make, in order.
        evaluate: compares each with the original; None does not.
        gates: what must hold, as in a file for `dsquant eval --gates`, or that file's path.
        publish: `rename` makes OUTPUT itself the result, at once; `symlink` keeps every result under OUTPUT/releases
            and points OUTPUT/current to the last.
        device: where to search scales; auto is a GPU where there is one.
        memory_budget: bytes of resident memory.
        gpu_memory_budget: bytes of GPU memory.
        on_failure: what happens when the run fails.
    """

    model: str = "tiny-r1"
    output: Path
    calibration: Calibration = Calibration()
    quantize: tuple[Step, ...] = Field(min_length=1)
    evaluate: EvaluateStep | None = None
    gates: dict[str, Any] | Path | None = None
    publish: Literal["rename", "symlink"] = "rename"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    memory_budget: Size | None = Field(default=None, ge=1)
    gpu_memory_budget: Size | None = Field(default=None, ge=1)
    on_failure: OnFailure = OnFailure()

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
    """Reads and checks a recipe.

    Args:
        path: a YAML file.
        model: instead of the recipe's.
        output: instead of the recipe's.

    Returns:
        The recipe.

    Raises:
        InputError: where the file is missing or no YAML.
        UsageError: where a key is unknown or a value cannot be meant, with the key's path.
    """
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
    """One problem, with the key's path, and for an unknown key the nearest one that there is."""
    location = tuple(part for part in problem["loc"] if part not in ("awq", "gguf") or problem["loc"][0] != "quantize")
    where = ".".join(str(part) for part in location) or "recipe"
    if problem["type"] == "union_tag_invalid":
        return f"{where}: a step has either `to` (formats of an AWQ step) or `type` (of a GGUF step), not both"
    if problem["type"] != "extra_forbidden":
        return f"{where}: {problem['msg'].removeprefix('Value error, ')}"
    known = sorted(_part_at(problem["loc"][:-1]).model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    return f"{where}: unknown key; {guess}"


def _part_at(location: tuple[Any, ...]) -> type[Part]:
    """The mapping that a key is in."""
    if location[:1] == ("quantize",):
        return GgufStep if "gguf" in location else AwqStep
    parts: dict[Any, type[Part]] = {"calibration": Calibration, "evaluate": EvaluateStep, "on_failure": OnFailure}
    return parts[location[0]] if location else ReleaseRecipe
