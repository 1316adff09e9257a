"""The model card of an output, and how to serve it."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsquant.escaping import markdown, markdown_cell
from dsquant.formats.table import SAFETENSORS
from dsquant.jobs.folder_state import RECORD_FILE
from dsquant.options import format_size
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


def _of_base(model: str) -> str:
    """Returns the lines by which the hub lists a card under the model that it was made from, if that is on the hub."""
    of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists()
    base = f"base_model: {model}\nbase_model_relation: quantized\n" if of_hub else ""
    return f"{base}pipeline_tag: text-generation\n"


def model_card(record: dict[str, Any], format_name: str) -> str:
    """Returns an output's README.md, from the run's record."""
    recipe, output, known = record["recipe"], record["outputs"][format_name], SAFETENSORS[format_name]
    grid = output["grid"]
    kind = "symmetric" if grid["symmetric"] else "asymmetric"
    quantized = len(output["weight_errors"])
    precision = by_output(record.get("precision", {}), record["outputs"]).get(format_name, {})
    widths = {entry["width"] for entry in precision.values()}
    chosen = widths.difference(KEPT_WIDTHS)
    kept = " (FP8 in its own blocks)" if known.holds_fp8 and recipe.get("rest") == "fp8" else " (FP8 as BF16)"
    kept = kept if record["source"]["bytes"] < record["source"]["bf16_bytes"] else ""
    bits = " and ".join(map(str, sorted(chosen))) or str(grid["bits"])
    preset = preset_and_steps(recipe["preset"], recipe["steps"])
    made = (
        f"Quantized by dsquant {record['versions']['dsquant']}, preset {preset}: {quantized} linears at "
        f"{bits} bits, {kind}, groups of {grid['group_size']}, in the format {format_name}; the rest in its "
        f"original precision{kept}. {format_size(record['source']['bytes'])} became "
        f"{format_size(output['bytes'])}."
    )
    tags = ["dsquant", format_name, *(f"{width}-bit" for width in sorted(chosen) or [grid["bits"]])]
    mixture = any(layer["tokens_per_expert"] for layer in record["layers"])
    library = known.library(widths - {UNQUANTIZED}, mixture)
    named = f"library_name: {library}\n" if library else ""
    parts = [
        f"---\n{named}{_of_base(recipe['model'])}tags:\n" + "".join(f"- {tag}\n" for tag in tags) + "---",
        f"# {markdown(Path(recipe['model']).name)}, {bits} bits",
        made,
        f"```\n{known.serve_command('.')}\n```",
    ]
    if precision:
        parts += ["## Widths", "Chosen by measured sensitivity, for the target in the recipe:"]
        parts += [_markdown_table(WIDTH_COLUMNS, width_rows(precision))]
    texts = record["divergence"].get(format_name)
    if texts:
        parts += ["## What it cost", "Against the original, on texts that calibration has not seen:"]
        parts += [divergence_table(texts)]
    if record["warnings"]:
        parts += ["## To know", "\n".join(f"- {markdown(warning)}" for warning in record["warnings"])]
    calibration = record["calibration"]
    parts.append(
        f"Calibrated on {calibration['samples']} samples of {calibration['seq_len']} tokens (SHA-256 "
        f"{calibration['sha256'][:16]}…). Recipe, versions, the errors of every layer and the hash of every tensor "
        f"stand in {RECORD_FILE}."
    )
    return "\n\n".join(parts) + "\n"
