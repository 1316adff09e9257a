"""Which linears have columns in whole groups, and are quantized therefore."""

import math
from collections.abc import Collection

from dsquant.errors import UsageError
from dsquant.formats.safetensors_target import matrix
from dsquant.formats.wanted import Wanted
from dsquant.model.structure import linear_groups


def in_groups(
    wanted: Wanted, quantizable: frozenset[str], released: Collection[str], sizes: tuple[int, ...]
) -> tuple[frozenset[str], int, tuple[str, ...]]:
    """Returns those of the `quantizable` linears that groups fit, the size of their groups, and notes for the user;
    `released` ones keep the source's own. Raises UsageError where nothing would be quantized.
    """
    linears, size, notes = _fitting(wanted, quantizable.difference(released), sizes)
    if not linears and not released:
        raise _nothing_fits(wanted, quantizable, sizes)
    return linears, size, notes


def _fitting(
    wanted: Wanted, linears: frozenset[str], sizes: tuple[int, ...]
) -> tuple[frozenset[str], int, tuple[str, ...]]:
    """Returns the linears that groups fit, the size of these, and notes for the user.

    The size is the recipe's; `auto` takes the one of `sizes` that fits the most weights, and leaves MLPs and inputs of
    attention with a linear that it does not fit, as where there is one size.
    """
    if wanted.recipe.group_size != "auto" and len(sizes) > 1:
        return linears, wanted.recipe.group_size, ()
    shapes = {linear: matrix(wanted.checkpoint.weights.shape(f"{linear}.weight")) for linear in sorted(linears)}
    together = [inside for layer in wanted.layers for inside in linear_groups(layer, linears).values()]

    def left(size: int) -> list[str]:
        odd = [inside for inside in together if any(shapes[linear][1] % size for linear in inside)]
        return [linear for inside in odd for linear in inside]

    size = min(sizes, key=lambda size: sum(math.prod(shapes[linear]) for linear in left(size)))
    odd = left(size)
    if not odd and len(sizes) == 1:
        return linears, size, ()
    note = f"groups of {size} weights, which fit the most linears"
    if odd:
        name, columns = next((name, shapes[name][1]) for name in odd if shapes[name][1] % size)
        note += f"; {len(odd)} linears stay unquantized for {name} and its like, which have {columns} columns"
    return linears.difference(odd), size, (note,)


def _nothing_fits(wanted: Wanted, linears: frozenset[str], sizes: tuple[int, ...]) -> UsageError:
    """Makes the error for an output in which no linear would be quantized."""
    words = f"--to {wanted.name}, --preset {wanted.recipe.preset}: no linear would be quantized"
    if not linears:
        return UsageError(f"{words}; take another preset")
    columns = {linear: wanted.checkpoint.weights.shape(f"{linear}.weight")[1] for linear in sorted(linears)}
    odd = next(linear for linear in columns if columns[linear] % min(sizes))
    groups = " or ".join(map(str, sorted(sizes)))
    return UsageError(
        f"{words}: {odd} and its like have {columns[odd]} columns, which are no whole groups of {groups}; take another "
        "format or preset"
    )
