"""Bytes divided among groups: within the budget, never worse than one width for all, never worse for more bytes."""

from hypothesis import given
from hypothesis import strategies as st

from dsquant.precision.allocation import GroupCosts, allocate

WIDTHS = (3, 4, 8, 16)


@st.composite
def choices(draw: st.DrawFn) -> list[GroupCosts]:
    found = []
    for number in range(draw(st.integers(1, 6))):
        sizes = sorted(draw(st.lists(st.integers(1, 60), min_size=4, max_size=4)))
        errors = [*draw(st.lists(st.integers(0, 1000), min_size=3, max_size=3)), 0]
        found.append(
            GroupCosts(str(number), dict(zip(WIDTHS, sizes, strict=True)), dict(zip(WIDTHS, errors, strict=True)))
        )
    return found


def size(groups: list[GroupCosts], widths: dict[str, int]) -> int:
    return sum(group.num_bytes[widths[group.name]] for group in groups)


def error(groups: list[GroupCosts], widths: dict[str, int]) -> float:
    return sum(group.errors[widths[group.name]] for group in groups)


@given(choices(), st.integers(0, 200), st.integers(0, 60))
def test_the_budget_is_kept_and_more_bytes_never_cost_more_error(
    groups: list[GroupCosts], left: int, more: int
) -> None:
    smallest = sum(min(group.num_bytes.values()) for group in groups)
    found, wider = allocate(groups, smallest + left), allocate(groups, smallest + left + more)
    assert size(groups, found) <= smallest + left
    assert error(groups, wider) <= error(groups, found)


@given(choices(), st.sampled_from(WIDTHS))
def test_no_width_for_all_of_the_same_size_errs_less(groups: list[GroupCosts], width: int) -> None:
    uniform = {group.name: width for group in groups}
    assert error(groups, allocate(groups, size(groups, uniform))) <= error(groups, uniform)


def test_bytes_go_where_each_lowers_the_error_most() -> None:
    groups = [
        GroupCosts("small", {4: 10, 8: 20, 16: 40}, {4: 100.0, 8: 1.0, 16: 0.0}),
        GroupCosts("large", {4: 100, 8: 200, 16: 400}, {4: 150.0, 8: 1.0, 16: 0.0}),
    ]
    assert allocate(groups, 110) == {"small": 4, "large": 4}
    assert allocate(groups, 125) == {"small": 8, "large": 4}
    assert allocate(groups, 140) == {"small": 16, "large": 4}
    assert allocate(groups, 220) == {"small": 8, "large": 8}
