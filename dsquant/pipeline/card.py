"""The model card of an output, and how to serve it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from dsquant.escaping import counted, markdown, markdown_cell, printable
from dsquant.formats.table import SAFETENSORS, format_of
from dsquant.jobs.folder_state import RECORD_FILE
from dsquant.options import format_size
from dsquant.pipeline.command import command_of
from dsquant.precision.groups import WIDTH_COLUMNS, by_output, width_rows
from dsquant.presets import preset_and_steps
from dsquant.schemes import KEPT_WIDTHS, UNQUANTIZED


def divergence_table(texts: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of an output's distance from the original."""
    lines = [
        "| held-out text | tokens | perplexity, original | perplexity | mean KL, nats | same top token |",
        "|---|---|---|---|---|---|",
    ]
    for text, found in texts.items():
        name = markdown_cell(text)
        lines.append(
            f"| {name} | {found['tokens']} | {found['perplexity_original']:.3f} | {found['perplexity']:.3f} "
            f"| {found['mean_kl']:.4f} | {found['top1_agreement']:.1%} |"
        )
    return "\n".join(lines)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(markdown_cell, line))} |" for line in lines)


def _front_matter(record: dict[str, Any], library: str | None, tags: Iterable[str]) -> str:
    """The lines by which the hub lists a card, among others under the model that it was made from, if that is there."""
    model, license_ = record["recipe"]["model"], record["source"].get("license", {})
    of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists()
    lines = [f"{key}: {value}" for key, value in license_.items()]
    lines += [f"library_name: {library}"] if library else []
    lines += [f"base_model: {model}", "base_model_relation: quantized"] if of_hub else []
    return "\n".join(["---", *lines, "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags), "---"])


def model_card(record: dict[str, Any], format_name: str) -> str:
    """Returns an output's README.md, from the run's record."""
    recipe, output = record["recipe"], record["outputs"][format_name]
    known, kind = format_of(_asked(recipe["to"], format_name)), format_name.partition(":")[2]
    precision = by_output(record.get("precision", {}), record["outputs"]).get(format_name, {})
    about = _about_types if known.has_types else _about_linears
    title, made, library, tags = about(record, format_name, precision)
    location = Path(output["folder"]).name if known.has_types else "."
    command = command_of(recipe)
    parts = [
        _front_matter(record, library, ["dsquant", format_name.partition(":")[0], *tags]),
        f"# {markdown(Path(recipe['model']).name)}, {title}",
        f"{made} {format_size(record['source']['bytes'])} became {format_size(output['bytes'])}.",
        f"```\n{known.serve_command(quote(location))}{output.get('serve_with', '')}\n```",
    ]
    if precision:
        parts += ["## Types" if kind else "## Widths", "Chosen by measured sensitivity, for the target in the recipe:"]
        parts += [_markdown_table(WIDTH_COLUMNS, width_rows(precision))]
    texts = record["divergence"].get(format_name)
    if texts:
        parts += ["## What it cost", "Against the original, on texts that calibration has not seen:"]
        parts += [divergence_table(texts)]
    if record["warnings"]:
        parts += ["## To know", "\n".join(f"- {markdown(warning)}" for warning in record["warnings"])]
    parts += ["## How it was made"]
    parts += [f"```\n{printable(command)}\n```"] if command else []
    return "\n\n".join([*parts, _calibrated(record)]) + "\n"


def _calibrated(record: dict[str, Any]) -> str:
    found = record["calibration"]
    words = "Recipe, versions, the errors of every layer and the hash of every tensor stand in " + RECORD_FILE + "."
    if not found:
        return words
    samples = f"{counted(found['samples'], 'sample')} of {found['seq_len']} tokens (SHA-256 {found['sha256'][:16]}…)"
    return f"Calibrated on {samples}. {words}"


def _asked(to: Sequence[str], format_name: str) -> str:
    """Returns the format as the recipe has it: a GGUF output with a target is named by that."""
    kind = format_name.partition(":")[0]
    return format_name if format_name in to else next(name for name in to if name.partition(":")[0] == kind)


def _about_linears(
    record: dict[str, Any], name: str, precision: Mapping[str, Any]
) -> tuple[str, str, str | None, list[str]]:
    """Returns title, description, library and tags of an output of safetensors."""
    recipe, output, known = record["recipe"], record["outputs"][name], SAFETENSORS[name]
    grid = output["grid"]
    widths = {entry["width"] for entry in precision.values()}
    chosen = sorted(widths.difference(KEPT_WIDTHS))
    kept = " (FP8 in its own blocks)" if known.holds_fp8 and recipe.get("rest") == "fp8" else " (FP8 as BF16)"
    kept = kept if record["source"]["bytes"] < record["source"]["bf16_bytes"] else ""
    bits = " and ".join(map(str, chosen)) or str(grid["bits"])
    preset = preset_and_steps(recipe["preset"], recipe["steps"])
    made = (
        f"Quantized by dsquant {record['versions']['dsquant']}, preset {preset}: "
        f"{len(output['weight_errors'])} linears at {bits} bits, "
        f"{'symmetric' if grid['symmetric'] else 'asymmetric'}, groups of {grid['group_size']}, in the format {name}; "
        f"the rest in its original precision{kept}."
    )
    mixture = any(layer["tokens_per_expert"] for layer in record["layers"])
    tags = [f"{width}-bit" for width in chosen or [grid["bits"]]]
    return f"{bits} bits", made, known.library(widths - {UNQUANTIZED}, mixture), tags


def _about_types(
    record: dict[str, Any], name: str, precision: Mapping[str, Any]
) -> tuple[str, str, str | None, list[str]]:
    """Returns the same of a GGUF output."""
    recipe, label = record["recipe"], name.partition(":")[2]
    sizes = record["outputs"][name]["bytes_by_type"]
    shares = {kind: size / sum(sizes.values()) for kind, size in sizes.items()}
    shown = ", ".join(f"{share:.0%} {kind}" for kind, share in shares.items() if share >= 0.005)
    steps = f", steps {', '.join(recipe['steps'])}" if recipe["steps"] else ""
    made = f"Converted to GGUF by dsquant {record['versions']['dsquant']}{steps}: {shown}."
    return label, made, "gguf", [label, *(["imatrix"] if record["calibration"] or recipe.get("imatrix") else [])]
