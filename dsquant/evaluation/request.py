"""What `dsquant eval` is asked for: models, texts, limits. Imports no torch."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dsquant.errors import UsageError
from dsquant.options import Accepts, Options, Spelling, Texts, text_of_path
from dsquant.recipes import Device, SampleLength


class DriftRequest(Options):
    """Whether and how code is generated."""

    prompts: Annotated[
        str | None,
        BeforeValidator(text_of_path),
        Accepts(str | Path | None),
        Spelling(default="python, where the models fit in memory"),
    ] = Field(
        default=None,
        description="Prompts for code: python (shipped), a .jsonl file (also HumanEval's and MBPP's), or none.",
    )
    max_tokens: int = Field(default=64, ge=1, description="Tokens of a completion.")
    execute: Annotated[bool, Spelling("--execute")] = Field(
        default=False, description="Run the completions with the prompts' tests, and report pass@1."
    )
    allow_code_execution: Annotated[bool, Spelling("--allow-code-execution")] = Field(
        default=False,
        description="Needed beside --execute: code that a model wrote will run on this machine, under limits that are "
        "not a security boundary.",
    )


class Measured(SampleLength, DriftRequest):
    """What candidates are measured on."""

    texts: Annotated[Texts, Spelling("--text", default="all shipped texts")] = Field(
        default=(), description="Shipped text (code, wiki, reasoning) or text file; may be repeated."
    )
    samples: int = Field(default=8, ge=1, description="The most samples of each text.")
    tasks: Annotated[Texts, Spelling(metavar="NAME[,NAME]", default="none")] = Field(
        default=(),
        description="Task or group of lm-evaluation-harness, such as arc_easy, or a YAML file of your own; may be "
        "repeated. The models must fit in memory.",
    )
    task_samples: Annotated[int | None, Spelling(default="all")] = Field(
        default=None, ge=1, description="The most documents of each task, the first ones."
    )

    @field_validator("tasks")
    @classmethod
    def _separated(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        named = [name.strip() for task in tasks for name in task.split(",")]
        if "" in named:
            raise ValueError("an empty name; write tasks as arc_easy,gsm8k")
        return tuple(dict.fromkeys(named))

    @model_validator(mode="after")
    def _samples_of_tasks(self) -> Self:
        if self.task_samples is not None and not self.tasks:
            raise ValueError("--task-samples does nothing without --tasks")
        return self


class EvaluationRequest(Device, Measured):
    """What to evaluate and how."""

    reference: Annotated[str, BeforeValidator(text_of_path)] = Field(
        description="The original: a folder, a hub id, tiny-r1, or a GGUF file."
    )
    candidates: Texts = Field(description="The same, of the same model.")
    seed: int = Field(default=0, ge=0, description="Of the intervals' random draws.")
    plain_rounding: Annotated[bool, Spelling("--plain-rounding")] = Field(
        default=False,
        description="Measure plain rounding to each candidate's grids too, the yardstick for what its steps gain.",
    )
    gates: Path | None = Field(default=None, description="YAML file of limits that decide verdict and exit code.")
    output: Annotated[Path | None, Spelling("-o")] = Field(default=None, description="Folder for the report.")


def candidate_names(paths: tuple[str, ...]) -> dict[str, str]:
    """Returns name -> path, with as much of the end of each path as no other candidate shares as its name. Raises
    UsageError where a candidate is given twice."""
    if len(set(paths)) < len(paths):
        twice = next(path for path, count in Counter(paths).items() if count > 1)
        raise UsageError(f"candidate {twice!r} is named twice")
    ends = {path: _ends(path) for path in paths}
    counts = Counter(end for found in ends.values() for end in dict.fromkeys(found))
    return {next((end for end in found if counts[end] == 1), path): path for path, found in ends.items()}


def _ends(path: str) -> list[str]:
    """Returns the path's last part, its last two parts, and so on."""
    parts = Path(path.removesuffix(".gguf")).parts
    return [str(Path(*parts[-count:])) for count in range(1, len(parts) + 1)]
