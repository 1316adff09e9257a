"""The engine bench's results as Markdown: all of them in docs/engines.md, a summary in README.

python -m benchmarks.engines.table      # writes both anew from benchmarks/engines_202611.json
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "engines_202611.json"
DOCUMENTS = {"engines": ROOT / "docs" / "engines.md", "engines-summary": ROOT / "README.md"}
BASELINE, OF_FP8 = "BF16", "FP8"
BASELINES = (BASELINE, OF_FP8)
ACTIVATIONS = "activations"
ON_GPU = "vLLM on an H200"
ENGINES = ("vLLM", ON_GPU, "transformers", "mlx-lm", "llama.cpp", "ik_llama.cpp")
NOT_RUN = "SGLang, KTransformers, TensorRT-LLM"
FLOATS = ("gguf:F32", "gguf:F16", "gguf:BF16")
ERROR_CHARACTERS = 160
# Noise below this is the order of sums, and its multiples say nothing.
LEAST = 1e-4
MOST_NOISE = 2
"""Of the baseline's; more would be a mistake in an output, or in an engine."""
SENSITIVE = {
    ("DeepSeek-V3 (tiny-r1, R1's heads)", "compressed-tensors 2 bits"),
    ("DeepSeek-V3 (tiny-r1, R1's heads)", "gguf:Q2_K"),
    ("Qwen3 MoE", "compressed-tensors 4 bits"),
    ("Qwen3 MoE", "awq, symmetric"),
}
"""Families and outputs whose very weights, stored unquantized, are noisy too: sensitivity.py, docs/engines.md."""


def results() -> dict[str, Any]:
    """The measured rows and the versions of the engines."""
    return json.loads(RESULTS.read_text())


def baseline(output: str) -> str:
    """The output whose noise an engine's noise stands beside.

    Engines of GGUF round activations to 8 bits beside all but floats: there it is that of Q8_0, whose own rounding of
    weights is the least.
    """
    if "rest FP8" in output:
        return OF_FP8
    if not output.startswith("gguf:"):
        return BASELINE
    return "gguf:BF16" if output in FLOATS else "gguf:Q8_0"


def ratio(row: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> float | None:
    """A row's noise in those of its baseline; None where either did not run."""
    if ACTIVATIONS in row["output"]:  # which engines round, and dsquant's reading does not
        return None
    wanted = (row["engine"], row["family"], baseline(row["output"]))
    base = next((one for one in rows if (one["engine"], one["family"], one["output"]) == wanted), None)
    if base is None or base["noise"] is None or row["noise"] is None:
        return None
    return max(row["noise"], LEAST) / max(base["noise"], LEAST)


def detailed(found: Mapping[str, Any]) -> str:
    """A table of every output in every engine."""
    parts = []
    for engine in filter(found["versions"].get, ENGINES):
        rows = [row for row in found["rows"] if row["engine"] == engine]
        named = ", ".join(f"{name} {version}" for name, version in found["versions"][engine].items())
        lines = [
            "| model | output | perplexity: engine, dsquant | noise | of the baseline's |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            times = ratio(row, rows)
            if row["error"]:
                told = re.sub(r"\s+", " ", row["error"]).replace("|", "\\|")
                cut = told if len(told) <= ERROR_CHARACTERS else told[:ERROR_CHARACTERS] + "…"
                cells = [f"does not run: {cut}", "", ""]
            else:
                cells = [f"{row['perplexity']:.2f}, {row['reading']:.2f}", f"{row['noise']:.4f}"]
                cells.append("" if times is None or row["output"] == baseline(row["output"]) else f"{times:.2f}")
            lines.append(f"| {' | '.join((row['family'], row['output'], *cells))} |")
        parts.append(f"### {engine}\n\n{named}.\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def kind(output: str) -> str:
    """The row of the summary that an output belongs to."""
    if output.startswith("gguf:"):
        return "gguf, unquantized" if output in FLOATS else "gguf"
    return re.sub(r"^(awq|mlx).*|, quality$", r"\1", output)


def summary(found: Mapping[str, Any]) -> str:
    """A table of formats and engines: how many models and outputs run, and their most noise."""
    engines = [engine for engine in ENGINES if engine in found["versions"]]
    heads = [f"{engine} {next(iter(found['versions'][engine].values()))}" for engine in engines]
    kinds = dict.fromkeys(kind(row["output"]) for row in found["rows"] if row["output"] not in BASELINES)
    lines = [f"| `--to` | {' | '.join(heads)} | {NOT_RUN} |", "|---" * (len(engines) + 2) + "|"]
    for name in sorted(kinds):
        cells = [_cell([row for row in found["rows"] if row["engine"] == one], name) for one in engines]
        lines.append(f"| {name} | {' | '.join(cells)} | {'' if name.startswith('gguf') else 'not run'} |")
    return "\n".join(lines)


def lacks_kernel(row: Mapping[str, Any]) -> bool:
    """Whether an engine says that it has no kernel for an output on this machine."""
    words = r"implement|[Nn]o .*(kernel|backend|scheme)|not supported|Only symmetric quantization is supported"
    return re.search(words, row["error"]) is not None


def _cell(rows: list[dict[str, Any]], name: str) -> str:
    mine = [row for row in rows if kind(row["output"]) == name and row["output"] not in BASELINES]
    if not mine:
        return ""
    ran = [row for row in mine if not row["error"]]
    lacking = "no kernel" if mine[0]["engine"] == ON_GPU else "no kernel for a CPU"
    if not ran:
        return lacking if all(map(lacks_kernel, mine)) else "does not run"
    times = [found for row in ran if (found := ratio(row, rows)) is not None]
    most = f", noise ×{max(times):.1f}" if times else ""
    rest = f"; {lacking} for the rest" if len(ran) < len(mine) else ""
    return f"{len(ran)} of {len(mine)}{most}{rest}"


def marked(text: str, mark: str, table: str) -> str:
    """A document with a table between its marks, in place of what was there."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"


def documents() -> dict[Path, str]:
    """The documents as they should be."""
    found = results()
    tables = {"engines": detailed(found), "engines-summary": summary(found)}
    return {path: marked(path.read_text(), mark, tables[mark]) for mark, path in DOCUMENTS.items()}


def write_tables() -> None:
    """Writes the tables into their documents."""
    for path, text in documents().items():
        path.write_text(text)


if __name__ == "__main__":
    write_tables()
