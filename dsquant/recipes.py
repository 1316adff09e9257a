"""A run as data: what the command line fills in, what every output folder records, what resume compares."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from dsquant.options import Accepts, Options, Size, Spelling, Texts, TextsOrFiles, format_size, text_of_path
from dsquant.presets import PRESET_STEPS, STEPS, Activations, Preset, Rest, Step, listed_steps

# What a resumed job may change: these have no influence on the weights' bytes.
CHANGEABLE_ON_RESUME = ("output", "memory_budget", "gpu_memory_budget", "evaluate")

# What `--calibration none` may look like.
NO_TEXTS = ("none", ["none"], ("none",), ())
FLOAT_TYPES = ("F32", "F16", "BF16")
_SHORT_TYPES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}


def _full_name(name: str) -> str:
    """Returns a format's name with its type as llama-quantize has it: gguf:q4_k is gguf:Q4_K_M."""
    kind, colon, type_name = name.partition(":")
    return f"{kind}{colon}{_SHORT_TYPES.get(type_name.upper(), type_name.upper())}"


def uses_texts(formats: Iterable[str], imatrix: object = None) -> bool:
    """Returns whether a job for these formats is calibrated by default: not where an imatrix stands for the texts, or
    where nothing is quantized."""
    return not imatrix and not {name.partition(":")[2].upper() for name in formats} <= set(FLOAT_TYPES)


class JobOptions(Options):
    """What every job is asked."""

    model: Annotated[str, BeforeValidator(text_of_path), Accepts(str | Path)] = Field(
        default="tiny-r1", description="A folder, a hub id, or tiny-r1."
    )
    output: Annotated[Path, Spelling("-o", default="./NAME-FORMAT-Nbit")] = Field(description="Folder to create.")
    evaluate: bool = Field(default=True, description="Compare with the original at the end.")


class TargetOptions(Options):
    """How large the output may become; widths or types are then chosen by measured sensitivity."""

    target_bits: float | None = Field(
        default=None,
        gt=0,
        le=32,
        description="Mean stored bits of what the preset quantizes (GGUF: of the decoder's weights), scales included, "
        "such as 4.5: widths (4, 8, BF16; others where these do not fit; for awq 4 or BF16) or types are chosen by "
        "measured sensitivity.",
    )
    target_size: Size | None = Field(
        default=None, ge=1, description="The same, for the size of all tensors, such as 340GiB."
    )

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.target_bits is not None and self.target_size is not None:
            raise ValueError("--target-bits and --target-size exclude each other; give one")
        return self

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


class Quantization(TargetOptions):
    """How weights are quantized, and to which formats."""

    to: Annotated[Texts, Spelling(metavar="FORMAT", default="compressed-tensors if FP8 or 4-bit; else awq")] = Field(
        default=("awq",),
        description="Format of the output; may be repeated, for one calibration and several outputs.",
    )
    bits: Literal[2, 3, 4, 5, 6, 7, 8] = Field(
        default=4, description="Bits of a weight; with a target, those that scales are searched for."
    )
    preset: Annotated[Preset | None, Spelling(default="quality; compact for dense or 4-bit models")] = Field(
        default=None,
        description="quality: routed experts only (dense models: compact); compact: every linear but kv_b_proj (see "
        "kv_b); best: the same, each for what the quantized model gives it, least drift, slower.",
    )
    steps: Annotated[
        tuple[Step, ...],
        Accepts(str | Sequence[str] | None),
        Spelling(metavar="LIST", default="the preset's; best adds follow, descend, in small models predictions"),
    ] = Field(
        default=None,
        validate_default=True,
        description=f"How the linears are quantized: some of {', '.join(STEPS)}, with commas, or none.",
    )
    group_size: Annotated[Literal[32, 64, 128, "auto"], Spelling(default="128, or auto where it does not fit")] = Field(
        default=128, description="Input channels of a scale; auto: what fits."
    )
    symmetric: Annotated[
        bool | None, Spelling("--symmetric/--asymmetric", default="what the format's engines want")
    ] = Field(default=None, description="Without or with zero points.")
    mtp: Literal["keep", "quantize", "drop"] = Field(
        default="keep",
        description="Multi-token-prediction layers: keep unquantized (in GGUF with the types of other layers), "
        "quantize, or drop.",
    )
    kv_b: Literal["keep", "quantize"] = Field(
        default="keep",
        description="kv_b_proj of latent attention: keep unquantized, or quantize; vLLM 0.20 to 0.27 stops at the "
        "second part of a prompt where it is quantized. GGUF quantizes it always, mlx never.",
    )
    rest: Annotated[Rest | None, Spelling(default="fp8 for compressed-tensors of an FP8 model, else bf16")] = Field(
        default=None,
        description="Linears that are not quantized: fp8 keeps the model's own blocks, bf16 widens them.",
    )
    activations: Activations | None = Field(
        default=None, description="Engines round inputs of 4-bit linears: fp8, int8 (compressed-tensors), fp4 (NVFP4)."
    )
    max_shard_bytes: Size = Field(
        default=5 * 2**30,
        ge=1,
        validation_alias=AliasChoices("max_shard_size", "max_shard_bytes"),
        serialization_alias="max_shard_size",
        description="Size of the largest output file.",
    )

    @field_validator("to")
    @classmethod
    def _distinct(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        for name in formats:
            if not re.fullmatch(r"[A-Za-z0-9_-]+\+?(:[A-Za-z0-9_]+\+?)?", name):
                raise ValueError(f"{name!r} is not a format's name, such as awq or gguf:Q4_K_M")
        named = tuple(map(_full_name, formats))
        if not named or len(set(named)) != len(named):
            raise ValueError(f"name each format once, found {', '.join(formats) or 'none'}")
        return named

    @field_validator("steps", mode="before")
    @classmethod
    def _listed(cls, steps: Any, info: ValidationInfo) -> Any:
        listed = PRESET_STEPS[info.data.get("preset") or "quality"] if steps is None else listed_steps(steps)
        if "predictions" in listed and "follow" not in listed:
            raise ValueError(
                "step predictions: rows are rounded for it while the quantized model is followed; add the step follow"
            )
        return listed


class GgufFiles(Options):
    """What GGUF files alone can be asked for."""

    imatrix: Path | None = Field(
        default=None, description="Importance matrix created by llama-imatrix or dsquant, instead of calibration."
    )
    tensor_types: Annotated[TextsOrFiles, Spelling("--tensor-type", metavar="REGEX=TYPE")] = Field(
        default=(),
        description="Type of the tensors in whose GGUF names the pattern is found; the first one counts. @FILE stands "
        "for the lines of a file, such as the tensor-types.txt of an output with a target.",
    )
    split_max_bytes: Annotated[Size, Spelling(default="one file")] = Field(
        default=0,
        ge=0,
        validation_alias=AliasChoices("split_max_size", "split_max_bytes"),
        serialization_alias="split_max_size",
        description="Write several files of at most this size, such as 48GiB.",
    )


class GgufQuantization(TargetOptions):
    """How the weights of GGUF files are quantized."""

    type: str = Field(
        default="Q4_K_M",
        description="A type or mixture of llama.cpp, from IQ1_S (1.6 bits) to BF16, such as IQ2_XXS, Q4_K_M, "
        "Q8_0; or Q4_K_M+, which keeps MLA attention, shared experts and dense layers at Q8_0; with a target, the type "
        "of tensors for which none is chosen.",
    )
    scales: bool = Field(default=True, description="Fold AWQ's scales in, in addition to the importance matrix.")
    mtp: Literal["keep", "drop"] = Field(
        default="drop", description="Multi-token-prediction layer: keep as llama.cpp's nextn tensors, or drop."
    )


class SampleLength(Options):
    """How texts are cut."""

    seq_len: int = Field(default=512, ge=8, description="Tokens of a sample.")


class Sampling(SampleLength):
    """How many tokens are taken from the calibration texts."""

    samples: int = Field(default=64, ge=1, description="Calibration samples.")
    seed: int = Field(default=0, ge=0, description="Seed for the choice of texts and for random sums.")


class Calibration(Sampling):
    """What scales and importances are taken from."""

    calibration: Annotated[Texts, Spelling(default="r1-mix")] = Field(
        default=("r1-mix",),
        description="A .txt, .jsonl or .parquet file; a mix (r1-mix, code, wiki; of the hub: hub-r1, hub-openthoughts, "
        "hub-pileval, hub-wikitext); hf:NAME[/CONFIG][:SPLIT][#COLUMN]; may be repeated; `none`: none (GGUF only).",
    )

    @field_validator("calibration", mode="before")
    @classmethod
    def _none(cls, texts: Any) -> Any:
        return () if texts in NO_TEXTS else texts


class Device(Options):
    """Where to compute, and in how much memory."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="auto is a GPU where there is one; the last bits of the output differ between devices.",
    )
    memory_budget: Annotated[Size | None, Spelling(default="80 % of what is free, at most 16GiB")] = Field(
        default=None, ge=1, description="Maximum resident memory, such as 16GiB."
    )


class MachineOptions(Device):
    """Where to compute, and in how much memory of each kind."""

    gpu_memory_budget: Annotated[Size | None, Spelling(default="90 % of what is free, at most 16GiB")] = Field(
        default=None, ge=1, description="Maximum GPU memory, such as 16GiB."
    )


class AwqOptions(MachineOptions, Calibration, Quantization, JobOptions):
    """What `dsquant awq` takes."""


class GgufOptions(MachineOptions, Calibration, GgufFiles, GgufQuantization, JobOptions):
    """What `dsquant gguf` takes: its defaults, and its own names for what a recipe says by `to` and `steps`."""

    output: Annotated[Path, Spelling("-o", default="./NAME-TYPE-GGUF; the target in the place of TYPE")] = Field(
        description="Folder to create."
    )


# Fields that records and hashes have whatever their value; one that is added later is there when it is not its default.
FIRST_FIELDS = frozenset({
    "bits", "calibrate", "calibration", "device", "evaluate", "gpu_memory_budget", "group_size", "imatrix",
    "max_shard_bytes", "memory_budget", "model", "mtp", "name", "output", "preset", "samples", "scales", "scales_from",
    "seed", "seq_len", "split_max_bytes", "steps", "symmetric", "target_bits", "target_size", "tensor_types", "to",
    "type",
})  # fmt: skip


def without_newer_defaults(options: Options, values: dict[str, Any], always: Set[str]) -> dict[str, Any]:
    """Returns the dumped values of options without those that are not in `always` and have their default."""
    fields = type(options).model_fields.items()
    unused = {name for name, field in fields if name not in always and getattr(options, name) == field.default}
    return {name: value for name, value in values.items() if name not in unused}


class Recipe(AwqOptions, GgufFiles):
    """Everything that determines a quantization run, whatever its formats."""

    scales_from: str | None = Field(
        default=None,
        description="SHA-256 of the record of the output whose scales, grids and codes are used; None calibrates.",
    )

    @model_validator(mode="before")
    @classmethod
    def _uncalibrated(cls, given: Any) -> Any:
        """Reads no texts by default where none are used, and takes no step by default without texts."""
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None}
        formats = given.get("to", "awq")
        formats = (formats,) if isinstance(formats, str) else formats
        if isinstance(formats, list | tuple) and not uses_texts(map(str, formats), given.get("imatrix")):
            given.setdefault("calibration", ())
        if given.get("calibration") in NO_TEXTS:
            given.setdefault("steps", ())
        return given

    @field_validator("steps")
    @classmethod
    def _in_order(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        return tuple(step for step in STEPS if step in steps)

    @model_serializer(mode="wrap")
    def _without_newer_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves newer fields out at their defaults: records and hashes stay those of recipes without them."""
        return without_newer_defaults(self, handler(self), FIRST_FIELDS - GgufFiles.model_fields.keys())

    @property
    def model_name(self) -> str:
        """The model's name in files and folders: the last part of its path or hub id, also in the hub's cache."""
        path = Path(self.model).resolve() if Path(self.model).name in ("", "..") else Path(self.model)
        return re.sub(r".*--([^/]+)/snapshots/[^/]+$", r"\1", str(path)).rpartition("/")[2]

    def lasting(self) -> dict[str, Any]:
        """The fields that determine the output's bytes, as plain JSON values."""
        return self.model_dump(mode="json", exclude=set(CHANGEABLE_ON_RESUME))

    @property
    def hash(self) -> str:
        """SHA-256 of `lasting`, hexadecimal."""
        return hashlib.sha256(json.dumps(self.lasting(), sort_keys=True).encode()).hexdigest()


def gguf_recipe(**options: Any) -> Recipe:
    """Builds the recipe of a job that creates GGUF files alone, with the defaults of `dsquant gguf`.

    Args:
        **options: fields of `GgufOptions`.

    Returns:
        The recipe.

    Raises:
        UsageError: where an option is unknown or its value is not allowed.
    """
    asked = GgufOptions.checked(**options)
    fields = {name: getattr(asked, name) for name in asked.model_fields_set if name not in ("type", "scales")}
    fields |= {} if asked.scales else {"steps": ()}
    return Recipe.checked(
        **fields
        | {
            "to": (f"gguf:{asked.type}",),
            "preset": "compact",
            "mtp": "quantize" if asked.mtp == "keep" else "drop",
        }
    )
