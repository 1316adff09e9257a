"""A release for people."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dsquant.recipes import format_size
from dsquant.releases.recipe import EVALUATION_FOLDER
from dsquant.reporting.notebook import table_of

if TYPE_CHECKING:
    from dsquant.releases.job import Release


def _distances(release: "Release") -> Table:
    texts = list(next(iter(release.evaluation.values())))
    rows = ((name, *(f"{found[text]['mean_kl']:.4f}" for text in texts)) for name, found in release.evaluation.items())
    return table_of("mean KL against the original, nats a token", ("output", *texts), rows)


def release_tables(release: "Release") -> Iterator[RenderableType]:
    """What `dsquant run` prints at the end.

    Args:
        release: what was published.

    Yields:
        What rich prints.
    """
    if release.already_published:
        yield Text(f"{release.output} is published already, and nothing has changed since; nothing to do")
    table = Table(title=str(release.output), title_justify="left")
    for heading in ("output", "folder", "size"):
        table.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold")
    for step, made in release.outputs.items():
        for name, folder in made["folders"].items():
            table.add_row(f"{step}: {name}", folder, format_size(made["bytes"][name]))
    yield table
    if release.evaluation:
        yield _distances(release)
        yield Text(f"The whole comparison: {release.output / EVALUATION_FOLDER / 'report.html'}")
    yield from (Text(line) for line in release.gates.get("outcomes", ()))
    for step, made in release.outputs.items():
        yield from (Text(f"Note: {step}: {warning}.") for warning in made["warnings"])
