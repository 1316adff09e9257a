"""The result of a job for its caller: where the files are, and what quantization cost."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from dsquant.evaluation.bands import verdict, written
from dsquant.evaluation.divergence import Divergence
from dsquant.files.foreign import blaming
from dsquant.files.strict_json import read_json_object
from dsquant.formats.table import format_of
from dsquant.jobs.folder_state import RECORD_FILE
from dsquant.jobs.journal import START_OVER
from dsquant.options import format_size
from dsquant.precision.groups import WIDTH_COLUMNS, by_output, width_rows
from dsquant.recipes import Recipe
from dsquant.reporting.notebook import Shown, table_of

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Result(Shown):
    """The output of a quantization run, and its cost."""

    output: Path
    folders: dict[str, Path]
    """Format -> checkpoint folder."""
    source_bytes: int
    """Of the data of the source's tensors, without the files' headers."""
    bf16_bytes: int
    """The source's size in BF16, in which the 4-bit formats keep unquantized tensors."""
    output_bytes: dict[str, int]
    """Format -> bytes of its shards."""
    divergence: dict[str, dict[str, Divergence]]
    """Format -> text -> distance from the original; empty where evaluation was off."""
    warnings: list[str]
    precision: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Group of linears, or GGUF tensor -> its width or type, bytes and error, where these were chosen; of several
    formats by format."""
    serve_with: dict[str, str] = field(default_factory=dict)
    """Format -> options without which its engine computes another network."""
    already_finished: bool = False
    pushed_to: str | None = None
    """Address of the repository that has it."""
    elapsed_s: float = 0.0
    peak_resident_bytes: int = 0
    peak_gpu_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **vars(self),
            "output": str(self.output),
            "folders": {name: str(folder) for name, folder in self.folders.items()},
            "divergence": {
                name: {text: vars(found) for text, found in texts.items()} for name, texts in self.divergence.items()
            },
        }

    def tables(self) -> "Iterator[RenderableType]":
        """Yields what rich prints of it: sizes, distances from the original, notes, and how to serve it."""
        from rich.text import Text

        if self.already_finished:
            yield f"{self.output} is finished already; nothing to do"
        sizes = {"original": self.source_bytes, "original as BF16": self.bf16_bytes, **self.output_bytes}
        rows = [(name, format_size(size), f"{size / self.source_bytes:.1%}") for name, size in sizes.items()]
        yield table_of(f"{self.output}", ("checkpoint", "size", "of original"), rows)
        for name, chosen in by_output(self.precision, self.folders).items():
            title = f"{name}: chosen by sensitivity" if len(self.folders) > 1 else "chosen by sensitivity"
            yield table_of(title, WIDTH_COLUMNS, width_rows(chosen))
        for name, texts in self.divergence.items():
            title = f"{name} against the original, on held-out texts"
            yield table_of(title, DISTANCES, [(text, *_distances(found)) for text, found in texts.items()])
            yield verdict(name, {text: found.mean_kl for text, found in texts.items()})
        yield from (f"Note: {warning}." for warning in self.warnings)
        yield from (f"Pushed to {address}" for address in [self.pushed_to] if address)
        for name in (name for name, size in self.output_bytes.items() if size > self.source_bytes):
            reason = "its types have more bits than the original's"
            if not format_of(name).has_types:
                kept = "what is not quantized (attention, embedding, head, a kept MTP layer)"
                reason = f"{kept} lies in BF16, twice its size in FP8"
            yield f"Note: {name} is larger than the original: {reason}."
        for name, folder in self.folders.items():
            command = format_of(name).serve_command(quote(str(folder))) + self.serve_with.get(name, "")
            yield Text(f"{name} is in {folder}; serve it with:\n  {command}", overflow="fold", no_wrap=True)
        if not self.already_finished:
            peak = f"{format_size(self.peak_resident_bytes)} of memory"
            if self.peak_gpu_bytes:
                peak += f" and {format_size(self.peak_gpu_bytes)} of GPU memory"
            yield f"Done in {self.elapsed_s:.0f} s, with at most {peak}."


DISTANCES = ("text", "tokens", "perplexity, original", "perplexity", "mean KL, nats", "same top token")


def _distances(found: Divergence) -> tuple[str, ...]:
    return (
        str(found.tokens),
        written(found.perplexity_original),
        written(found.perplexity),
        f"{found.mean_kl:.4f}",
        f"{found.top1_agreement:.1%}",
    )


def finished_result(recipe: Recipe) -> Result:
    """Returns the result of a job that has finished before; raises InputError where its record is not dsquant's."""
    path = recipe.output / RECORD_FILE
    record = read_json_object(path, START_OVER, finite=False)
    with blaming(path, START_OVER):
        result = result_of(recipe, record, already_finished=True)
        list(result.tables())  # what callers will show of it
    return result


def result_of(recipe: Recipe, record: dict[str, Any], **changes: Any) -> Result:
    """Returns the result of a recipe's record; `changes` are fields of the result that no record holds."""
    outputs = record["outputs"]
    return Result(
        output=recipe.output,
        folders={name: recipe.output / output["folder"] for name, output in outputs.items()},
        source_bytes=record["source"]["bytes"],
        bf16_bytes=record["source"]["bf16_bytes"],
        output_bytes={name: output["bytes"] for name, output in outputs.items()},
        divergence={
            name: {text: Divergence(**values) for text, values in texts.items()}
            for name, texts in record["divergence"].items()
        },
        warnings=record["warnings"],
        precision=record.get("precision", {}),
        serve_with={name: output["serve_with"] for name, output in outputs.items() if "serve_with" in output},
        **changes,
    )
