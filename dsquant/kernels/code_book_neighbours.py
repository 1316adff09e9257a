"""The points of a code book that are near a vector, of which a search tries each.

A weight over its scale is rounded to the nearest value that points have, and a vector of such values has a list of the
points nearest to it, as ggml's `iq2_data` and `iq3_data` have (ggml-quants.c, https://github.com/ggml-org/ggml). ggml
looks at it only where the vector itself is no point; here every point of a longer list is tried, by its weighed error.
That is within 0.3 % of the error of all points (docs/LOG.md); a quarter (IQ2_XXS) to a 64th (IQ1) of them are tried.

Shape legend: A shifts of all points, K points, P weights of a point, M vectors of values, C neighbours of one, J bounds
between values, E vectors of 8 weights, G points of one.
"""

from dataclasses import dataclass
from functools import cache

import torch

from dsquant.kernels.code_books import TYPES, points_of, shifts_of


@dataclass(frozen=True)
class Neighbours:
    """A type's points before any shift, and what is near what."""

    grid_KP: torch.Tensor
    """float32."""
    nearest_MC: torch.Tensor
    """int16, numbers of points, the nearest first. A row's number has the places of the vector's values as digits, the
    first weight's lowest."""
    bounds_J: torch.Tensor
    """float32, between the values that a weight (without its sign, where points have none) may have."""
    shifts: tuple[float, ...]
    """What may be added to all values of a point."""

    @property
    def base(self) -> int:
        """Values that a weight may have."""
        return len(self.bounds_J) + 1

    def to(self, device: torch.device) -> "Neighbours":
        return Neighbours(self.grid_KP.to(device), self.nearest_MC.to(device), self.bounds_J.to(device), self.shifts)


@cache
def neighbours_of(type_name: str) -> Neighbours:
    """Returns the neighbours of all vectors of values, on the CPU."""
    kind, shifts = TYPES[type_name], shifts_of(type_name)
    grid_KP = points_of(type_name).flatten(0, 1)
    grid_KP = grid_KP[: len(grid_KP) // len(shifts)] - shifts[0]
    values = grid_KP.unique()
    places_MP = torch.cartesian_prod(*[torch.arange(len(values))] * grid_KP.shape[1]).flip(1)
    # Whole numbers: squares are exact, and a point's number decides between equals.
    vectors_MP, points_KP = ((part / kind.unit).round().double() for part in (values[places_MP], grid_KP))
    squares_K = points_KP.square().sum(1)
    nearest = [
        ((squares_K - 2 * part_MP @ points_KP.T).long() * len(grid_KP) + torch.arange(len(grid_KP)))
        .topk(min(kind.neighbours, len(grid_KP)), largest=False)
        .indices.to(torch.int16)
        for part_MP in vectors_MP.split(1024)
    ]
    return Neighbours(grid_KP, torch.cat(nearest), (values[:-1] + values[1:]) / 2, shifts)


@cache
def neighbours_on(device: torch.device, type_name: str) -> Neighbours:
    """Copies `neighbours_of` to a device once: work that a GPU replays copies nothing from the host."""
    return neighbours_of(type_name).to(device)


@dataclass(frozen=True)
class Nearest:
    """A point for each vector of 4 or 8 weights."""

    error_EG: torch.Tensor
    """float32, its weighed squared error, without the constant sum(w x^2)."""
    product_EG: torch.Tensor
    """float32, sum(w x g), with the sign that is given up."""
    energy_EG: torch.Tensor
    """float32, sum(w g^2)."""
    number_EG: torch.Tensor
    """int64, its place in the flattened `points_of`."""
    flipped_EG: torch.Tensor
    """bool, whether a sign is given up."""

    def where(self, other: "Nearest", better: torch.Tensor) -> "Nearest":
        """Another's points where `better`, bool [E, G], says so, and these elsewhere."""
        return Nearest(
            *(torch.where(better, getattr(other, name), getattr(self, name)) for name in self.__dataclass_fields__)
        )


def nearest(
    values_EGP: torch.Tensor, importance_EGP: torch.Tensor, scale_E: torch.Tensor, shift: int, type_name: str
) -> Nearest:
    """Returns the points of the least error under scales and one of the type's shifts.

    Values, float32, lose their signs for a type whose points have none; where 8 signs have to be even, an odd one is
    given up in the vector and at the weight where that costs least. Importances weigh squared errors.
    """
    kind, near = TYPES[type_name], neighbours_on(values_EGP.device, type_name)
    odd_E1 = (values_EGP < 0).flatten(1).sum(1, keepdim=True) % 2 == 1
    values_EGP = values_EGP if kind.signs == "delta" else values_EGP.abs()
    scale_E11 = scale_E.view(-1, 1, 1)
    digits_EGP = (values_EGP.unsqueeze(3) > (near.bounds_J + near.shifts[shift]) * scale_E11.unsqueeze(3)).sum(3)
    places_P = near.base ** torch.arange(values_EGP.shape[2], device=values_EGP.device)
    tried_EGC = near.nearest_MC[(digits_EGP * places_P).sum(2)].long()
    points_EGCP = near.grid_KP[tried_EGC] + near.shifts[shift]
    weighed_EGP1 = (importance_EGP * values_EGP).unsqueeze(3)
    product_EGC = (points_EGCP @ weighed_EGP1).squeeze(3)
    energy_EGC = (points_EGCP.square() @ importance_EGP.unsqueeze(3).expand_as(weighed_EGP1)).squeeze(3)
    first = shift * len(near.grid_KP)

    def least(product_EGC: torch.Tensor, flipped: bool) -> Nearest:
        error_EG, place_EG = (scale_E11 * (scale_E11 * energy_EGC - 2 * product_EGC)).min(2)
        of_place = (part.gather(2, place_EG.unsqueeze(2)).squeeze(2) for part in (product_EGC, energy_EGC, tried_EGC))
        product_EG, energy_EG, number_EG = of_place
        return Nearest(error_EG, product_EG, energy_EG, number_EG + first, torch.full_like(number_EG, flipped).bool())

    found = least(product_EGC, False)
    if kind.signs != "even":
        return found
    given_up_EGC = (points_EGCP * weighed_EGP1.transpose(2, 3)).amin(3)
    flipped = least(product_EGC - 2 * given_up_EGC, True)
    cheapest_E1 = (flipped.error_EG - found.error_EG).argmin(1, keepdim=True)
    return found.where(flipped, torch.zeros_like(found.flipped_EG).scatter_(1, cheapest_E1, odd_E1))
