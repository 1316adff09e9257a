"""A delta for people."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from dsquant.recipes import format_size

if TYPE_CHECKING:
    from dsquant.incremental.applying import AppliedPatch
    from dsquant.incremental.release import Delta


def delta_tables(made: "Delta") -> Iterator[RenderableType]:
    """What `dsquant delta` prints.

    Args:
        made: what was made.

    Yields:
        What rich prints.
    """
    if made.already_finished:
        yield Text(f"{made.output} is finished already; only the patch was written.")
    yield Text(
        f"{len(made.changed)} of {made.parameters} parameters have changed and were made under the recorded scales, "
        f"{len(made.anew)} linears on a new grid."
    )
    yield Text(f"Files reused: {_ways(made.reused)} ({format_size(made.reused_bytes)}).")
    old = f", {format_size(made.old_read_bytes)} of the old one" if made.old_read_bytes else ""
    yield Text(f"Read: {format_size(made.new_read_bytes)} of the new release{old}.")
    share = made.patch_bytes / made.output_bytes
    sizes = f"The output has {format_size(made.output_bytes)}, the patch {format_size(made.patch_bytes)} ({share:.1%})"
    yield Text(f"{sizes}; {made.patch} turns the old output into {made.output}.")


def patch_tables(made: "AppliedPatch") -> Iterator[RenderableType]:
    """What `dsquant delta --apply` prints.

    Args:
        made: what was made.

    Yields:
        What rich prints.
    """
    yield Text(f"{made.output}: {made.num_files} files, {format_size(made.num_bytes)}; reused: {_ways(made.reused)}.")


def _ways(reused: Mapping[str, int]) -> str:
    return ", ".join(f"{count} by {way}" for way, count in reused.items()) or "none"
