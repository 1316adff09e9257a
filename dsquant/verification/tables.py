"""A verification for people."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dsquant.recipes import format_size

if TYPE_CHECKING:
    from dsquant.verification.checks import Verification


def verification_tables(found: "Verification") -> Iterator[RenderableType]:
    """What `dsquant verify` prints.

    Args:
        found: what was found.

    Yields:
        What rich prints.
    """
    if found.findings:
        table = Table(title=f"{found.folder} is not what was written", title_justify="left")
        for heading in ("file", "where", "problem"):
            table.add_column(heading, overflow="fold")
        for finding in found.findings:
            table.add_row(Text(finding.file), Text(finding.where), Text(finding.problem))
        yield table
    count = f"{len(found.findings)} finding{'s' * (len(found.findings) != 1)}"
    files = f"{found.num_files} file{'s' * (found.num_files != 1)}"
    yield Text(f"{files}, {format_size(found.num_bytes)} read; {count}.")
    for name, number in found.compared.items():
        yield Text(f"{name}: {number} parameters decoded and compared with {found.source}.")
    for check in found.not_checked:
        yield Text(f"Not checked: {check}.")
    for note in found.notes:
        yield Text(f"Note: {note}.")
