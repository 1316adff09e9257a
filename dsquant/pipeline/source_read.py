"""Hashes the source once, while it is read for the units, and notes with each unit what it was made from."""

from collections.abc import Callable, Sequence

from dsquant.pipeline.planning import Unit
from dsquant.pipeline.run_state import Run
from dsquant.pipeline.supervision import source_hashes
from dsquant.source.checkpoint import stored_parts


def hash_unit(run: Run, unit: Unit, safe_point: Callable[[str], None]) -> dict[str, str]:
    """Returns the SHA-256 of every stored tensor of a unit, on every rank; reads what no rank has read as a whole.

    Raises InputError where a tensor holds NaN or infinity.
    """
    index = run.source.checkpoint.index
    stored = [name for one in unit.parameters for name in stored_parts(index, one)]
    found = _hashed(run, stored, safe_point)
    run.tell("scan", len(source_hashes(run.job)) + len(found), len(index), unit.name)
    return found


def hash_unread(run: Run) -> None:
    """Reads and hashes what is in no unit: dropped layers, and tensors that engines compute; notes the hashes of all
    tensors in the job, for its record."""
    index = run.source.checkpoint.index
    found = run.ranks.once(lambda: source_hashes(run.job))
    found |= _hashed(run, [name for name in index if name not in found], lambda name: run.check())
    run.job.notes["tensors"] = {name: found[name] for name in index}
    run.tell("scan", len(index), len(index), "")


def _hashed(run: Run, names: Sequence[str], safe_point: Callable[[str], None]) -> dict[str, str]:
    """The hashes of tensors; each rank reads its share of those that none has read."""
    read, ranks = run.read, run.ranks
    assert read is not None
    known = {name for part in ranks.gather([name for name in names if name in read.found]) for name in part}
    missing = [name for name in names if name not in known]
    ranks.together(lambda: read.rest(missing[ranks.rank :: ranks.size], safe_point))
    parts = ranks.gather({name: read.found[name] for name in names if name in read.found})
    found = {name: digest for part in parts for name, digest in part.items()}
    return {name: found[name] for name in names}
