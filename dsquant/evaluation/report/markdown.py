"""Writes report.md."""

from typing import TYPE_CHECKING

from dsquant.escaping import markdown as escaped
from dsquant.escaping import markdown_cell
from dsquant.evaluation.bands import verdicts
from dsquant.evaluation.report import tables
from dsquant.evaluation.report.tables import Table
from dsquant.evaluation.report.task_table import task_table

if TYPE_CHECKING:
    from dsquant.evaluation.results import Evaluation


def markdown(evaluation: "Evaluation") -> str:
    """Returns the text of report.md."""
    names = ", ".join(one.name for one in evaluation.given)
    parts = [f"# {escaped(f'{names} against {evaluation.reference.path}')}"]
    if evaluation.verdict is not None:
        parts.append(f"**Verdict: {evaluation.verdict}.**")
    parts.append("\n".join(f"- {escaped(sentence)}" for sentence in verdicts(evaluation)))
    parts.append(_table(tables.summary(evaluation)))
    gates = tables.gates(evaluation)
    if gates is not None:
        parts.append(_table(gates))
    findings = [
        f"- **{escaped(one.name)}**: {escaped(finding.message)}" for one in evaluation.given for finding in one.findings
    ]
    if findings:
        parts += ["## What is broken", "\n".join(findings)]
    parts += [_table(table) for table in tables.texts(evaluation)]
    parts += [_table(table) for table in tables.drift(evaluation)]
    parts += [_table(one) for one in (tables.execution(evaluation), task_table(evaluation)) if one is not None]
    parts += [_table(table) for table in tables.ladders(evaluation)]
    for one in evaluation.given:
        parts += [_table(tables.layers(one)), _table(tables.weights(one))]
    parts.append(_table(tables.identity(evaluation)))
    if evaluation.caveats:
        caveats = "\n".join(f"- {escaped(caveat)}" for caveat in evaluation.caveats)
        parts += ["## What these numbers do not show", caveats]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    lines = [table.headings, ("---", *("---:" for _ in table.headings[1:])), *table.rows]
    rows = "\n".join("| " + " | ".join(map(markdown_cell, line)) + " |" for line in lines)
    note = f"\n\n{escaped(table.note)}" if table.note else ""
    return f"## {escaped(table.title)}\n\n{rows}{note}"
