"""Formats of integers in groups."""

from dsquant.formats.safetensors import SafetensorsFormat
from dsquant.formats.wanted import Wanted
from dsquant.schemes import GROUP_SIZES, Grid


class IntegerFormat(SafetensorsFormat[Grid]):
    """A format whose codes are integers."""

    group_sizes = GROUP_SIZES

    def scheme(self, wanted: Wanted, group_size: int, output: str) -> Grid:
        recipe = wanted.recipe
        symmetric = self.default_symmetric(wanted.mixture) if recipe.symmetric is None else recipe.symmetric
        return Grid(recipe.bits, group_size, bool(symmetric), output=output)

    def default_symmetric(self, mixture: bool) -> bool | None:
        return False
