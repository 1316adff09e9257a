"""A run as data: what the command line fills in, what every output folder records, what resume compares."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dsquant.errors import UsageError

# What a resumed job may change: these have no influence on the weights' bytes.
CHANGEABLE_ON_RESUME = ("output", "memory_budget", "gpu_memory_budget", "evaluate")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Preset = Literal["quality", "compact", "best"]
Step = Literal["scales", "clip", "compensate", "top-up", "gate-weights", "follow", "descend"]
"""A step of the quantization. `scales`: AWQ's scales are searched and folded in. `clip`: each group's range is shrunk
to what costs least. `compensate`: later columns make good what earlier ones lost (GPTQ). `top-up`: experts with few
tokens get those that the router scores highest for them. `gate-weights`: a token counts in an expert's statistics by
its squared share in the mixture. `follow`: statistics of the quantized model's inputs, aiming at the original's
outputs. `descend`: coordinate descent on scales, zero points and codes."""
STEPS: tuple[Step, ...] = get_args(Step)

_COMPACT: tuple[Step, ...] = ("scales", "clip", "compensate", "top-up")
PRESET_STEPS: Mapping[Preset, tuple[Step, ...]] = {
    "quality": _COMPACT,
    "compact": _COMPACT,
    "best": (*_COMPACT, "follow", "descend"),
}


def listed_steps(steps: Any) -> Any:
    """Steps as a list, which may be given as names with commas, or as `none`.

    Args:
        steps: a text, or names.

    Returns:
        The names.

    Raises:
        ValueError: naming what is no step.
    """
    if isinstance(steps, str):
        steps = [name.strip() for name in steps.split(",")]
    if not isinstance(steps, list | tuple | set | frozenset):
        raise ValueError(f"{steps!r:.80} is no list of steps: give some of {', '.join(STEPS)}, or none alone")
    if list(steps) == ["none"]:
        return []
    unknown = [repr(step) for step in steps if step not in STEPS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: give some of {', '.join(STEPS)}, or none alone")
    return list(steps)


StepNames = Annotated[tuple[Step, ...], BeforeValidator(listed_steps)]


def _told(problem: Mapping[str, Any]) -> str:
    """One of pydantic's problems; of a whole recipe it names no field."""
    field, words = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
    return f"{field}: {words}" if field else words


class Recipe(BaseModel):
    """Everything that determines a quantization run.

    Attributes:
        model: a folder, a hub id, or `tiny-r1`.
        output: the folder to make.
        to: formats, of `dsquant.formats.table.FORMATS`; `gguf:TYPE` with a type or mixture of
            `dsquant.formats.gguf.types.MIXTURES`, with a target that of the tensors that no type is chosen for.
        bits: bits of a code; with a target, of the grid that scales are searched for.
        target_bits: mean stored bits, scales and zero points included, that the weights which the preset quantizes
            (GGUF: the decoder's linears) may have at most; widths or types are then chosen by measured sensitivity.
        target_size: bytes of all tensors that the output may have at most; likewise.
        group_size: input channels that share a scale.
        symmetric: whether zero points are constant; None takes what each format's engines want.
        preset: `quality` quantizes routed experts only, `compact` every linear of the decoder, `best` every linear
            for the inputs that the quantized model gives it; None is quality for mixtures of experts and compact for
            dense models.
        steps: of the quantization; also given as names with commas, or `none`. None takes the preset's.
        calibration: texts, mixes or hub sets; none where empty, which GGUF alone can do without.
        samples: calibration samples.
        seq_len: tokens of a sample.
        seed: of the choice of texts and of every random sum.
        mtp: what happens to multi-token-prediction layers: kept in BF16, quantized, or dropped.
        device: where to compute; auto is a GPU where there is one. The bytes differ in the last bits between devices.
        max_shard_bytes: upper bound on a shard's size, as far as single tensors allow.
        imatrix: of GGUF: a file of importances to use instead of calibration.
        tensor_types: of GGUF: overrides `REGEX=TYPE`; the first that is found in a tensor's GGUF name counts.
        split_max_bytes: of GGUF: the most tensor data in one file, as far as single tensors allow; 0 makes one file.
        memory_budget: bytes of resident memory; None is 80 % of what is available, at most 16 GiB.
        gpu_memory_budget: bytes of GPU memory; None is 90 % of what is free, at most 16 GiB.
        evaluate: whether the output is compared with the original at the end.
        scales_from: SHA-256 of the record of the output whose scales, grids and codes are used; None calibrates.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "tiny-r1"
    output: Path
    to: tuple[str, ...] = ("awq",)
    target_bits: float | None = Field(default=None, gt=0, le=32)
    target_size: int | None = Field(default=None, ge=1)
    bits: Literal[3, 4, 8] = 4
    group_size: Literal[32, 64, 128] = 128
    symmetric: bool | None = None
    preset: Preset | None = None
    steps: tuple[Step, ...] = Field(default=None, validate_default=True)
    calibration: tuple[str, ...] = ("r1-mix",)
    samples: int = Field(default=64, ge=1)
    seq_len: int = Field(default=512, ge=8)
    seed: int = Field(default=0, ge=0)
    mtp: Literal["keep", "quantize", "drop"] = "keep"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_shard_bytes: int = Field(default=5 * 2**30, ge=1)
    # Left out of records and hashes where they are not given, as in those from before they were fields here.
    imatrix: Path | None = Field(default=None, exclude_if=lambda path: path is None)
    tensor_types: tuple[str, ...] = Field(default=(), exclude_if=lambda types: not types)
    split_max_bytes: int = Field(default=0, ge=0, exclude_if=lambda size: not size)
    memory_budget: int | None = Field(default=None, ge=1)
    gpu_memory_budget: int | None = Field(default=None, ge=1)
    evaluate: bool = True
    scales_from: str | None = None

    @field_validator("to")
    @classmethod
    def _distinct(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        if not formats or len(set(formats)) != len(formats):
            raise ValueError(f"name each format once, found {', '.join(formats) or 'none'}")
        for name in formats:
            if not re.fullmatch(r"[a-z0-9-]+(:[A-Z0-9_]+\+?)?", name):
                raise ValueError(f"{name!r} is no format's name, such as awq or gguf:Q4_K_M")
        return formats

    @field_validator("calibration", mode="before")
    @classmethod
    def _none(cls, texts: Any) -> Any:
        return () if texts in ("none", ["none"], ("none",)) else texts

    @field_validator("steps", mode="before")
    @classmethod
    def _listed(cls, steps: Any, info: ValidationInfo) -> Any:
        return PRESET_STEPS[info.data.get("preset") or "quality"] if steps is None else listed_steps(steps)

    @field_validator("steps")
    @classmethod
    def _in_order(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        return tuple(step for step in STEPS if step in steps)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.target_bits is not None and self.target_size is not None:
            raise ValueError("--target-bits and --target-size exclude each other; give one")
        return self

    @classmethod
    def checked(cls, /, **fields: Any) -> Self:
        """Builds a recipe.

        Args:
            **fields: the fields that differ from the defaults.

        Returns:
            The recipe.

        Raises:
            UsageError: where a field is unknown or has a value that cannot be meant.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            problems = "; ".join(_told(problem) for problem in error.errors())
            raise UsageError(problems) from error

    def lasting(self) -> dict[str, Any]:
        """The fields that determine the output's bytes, as plain JSON values."""
        return self.model_dump(mode="json", exclude=set(CHANGEABLE_ON_RESUME))

    @property
    def hash(self) -> str:
        """SHA-256 of `lasting`, hexadecimal."""
        return hashlib.sha256(json.dumps(self.lasting(), sort_keys=True).encode()).hexdigest()

    @property
    def target(self) -> str | None:
        """The target as the command line gives it; None where there is none."""
        if self.target_bits is not None:
            return f"--target-bits {self.target_bits}"
        return None if self.target_size is None else f"--target-size {format_size(self.target_size)}"

    @property
    def target_name(self) -> str | None:
        """The target as part of a file's name: 4.5bits, 340.00GiB; None where there is none."""
        if self.target_bits is not None:
            return f"{self.target_bits:g}bits"
        return None if self.target_size is None else format_size(self.target_size).replace(" ", "")


FLOAT_TYPES = ("F32", "F16", "BF16")
_SHORT_TYPES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def gguf_recipe(
    *,
    type: str,
    calibration: tuple[str, ...] | None = None,
    imatrix: Path | None = None,
    scales: bool = True,
    mtp: str = "drop",
    **fields: Any,
) -> Recipe:
    """The recipe of a job that makes GGUF files alone, with the defaults of `dsquant gguf`.

    Args:
        type: a type or mixture; Q4_K is Q4_K_M, as for llama-quantize.
        calibration: texts to take scales and importances from; None is r1-mix, or no calibration where an imatrix is
            given or the type does not quantize.
        imatrix: a file of importances to use.
        scales: whether AWQ's scales are searched and folded in, where there is calibration.
        mtp: whether the multi-token-prediction layer is kept as `nextn` tensors or dropped.
        **fields: further fields of the recipe.

    Returns:
        The recipe.

    Raises:
        UsageError: where a field is unknown or has a value that cannot be meant.
    """
    type_name = _SHORT_TYPES.get(type.upper(), type.upper())
    calibration = () if calibration == ("none",) else calibration
    if calibration is None:
        calibration = () if imatrix or type_name in FLOAT_TYPES else ("r1-mix",)
    return Recipe.checked(
        to=(f"gguf:{type_name}",),
        preset="compact",
        steps=PRESET_STEPS["compact"] if scales and calibration else (),
        calibration=calibration,
        imatrix=imatrix,
        mtp="quantize" if mtp == "keep" else mtp,
        **fields,
    )


def preset_and_steps(preset: Preset, steps: Sequence[Step]) -> str:
    """A preset for people, with the steps where they are not its own: compact, steps scales and clip."""
    if set(steps) == set(PRESET_STEPS[preset]):
        return preset
    return f"{preset}, steps {' and '.join(steps)}" if steps else f"{preset}, no steps"


# More than this is no size of anything.
MOST_BYTES = 2**60


def parse_size(text: str) -> int:
    """Reads a size such as `16GiB`, `512MiB` or `1000000`.

    Args:
        text: a number with an optional unit B, KiB, MiB, GiB, TiB.

    Returns:
        Bytes.

    Raises:
        UsageError: where it is no size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT]?)i?B?)?\s*", text, re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < MOST_BYTES:
        raise UsageError(f"{text!r} is not a size; write it as 16GiB, 512MiB or a number of bytes")
    return int(float(match[1]) * UNITS[(match[2] or "").upper()])


def format_size(num_bytes: float) -> str:
    """Writes a number of bytes for people: 11.9 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"
