"""Work that a GPU replays."""

import math

import pytest
import torch

from dsquant.kernels.graphs import launches_within, recorded_launches, replayed
from dsquant.quantization.compensate import with_inverses
from dsquant.quantization.statistics import InputStatistics
from dsquant.quantization.steps import rounded_weight
from dsquant.schemes import Grid, Scheme
from dsquant.schemes.ggml_types import GGML_TYPES


def _overwriting(values: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values += other
    return values * 2, values.sum(0)


def test_a_cpu_just_does_the_work() -> None:
    doubled, total = replayed(_overwriting, "a test", torch.ones(3), torch.ones(3))
    assert doubled.tolist() == [4.0, 4.0, 4.0] and float(total) == 6.0


@pytest.mark.gpu
def test_replayed_work_gives_what_the_work_gives_for_inputs_of_any_numbers_and_shapes() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    with recorded_launches():
        for size in (5, 64, 7) * 4:
            values, other = (torch.randn(size, 3, device="cuda", generator=generator) for _ in range(2))
            found = replayed(_overwriting, "a test", values.clone(), other)
            for part, wanted in zip(found, _overwriting(values, other), strict=True):
                torch.testing.assert_close(part, wanted, rtol=0, atol=0)


@pytest.mark.gpu
def test_kept_launches_are_replayed_in_the_next_block_of_their_kind_alone() -> None:
    calls = list[int]()

    def doubled(values: torch.Tensor) -> tuple[torch.Tensor]:
        calls.append(len(values))
        return (values * 2,)

    def called(again: bool) -> int:
        calls.clear()
        with recorded_launches(again):
            for number in range(3):
                (found,) = replayed(doubled, "a test", torch.full((4,), float(number), device="cuda"))
                assert found.tolist() == [2.0 * number] * 4
        return len(calls)

    with launches_within(math.inf, keeps=True):
        assert [called(True), called(True), called(False), called(True)] == [2, 0, 2, 0]
    with launches_within(math.inf, keeps=False):
        assert [called(True), called(True)] == [2, 2]
    with launches_within(31, keeps=True):  # a graph of four numbers takes 32 bytes
        assert [called(True), called(True)] == [3, 3]
    assert called(True) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "scheme", [Grid(4, 128, True), Grid(4, 128, False), *map(GGML_TYPES.get, ("Q4_K", "Q4_0", "IQ1_S", "IQ3_XXS"))]
)
def test_many_weights_are_rounded_as_one_alone(scheme: Scheme) -> None:
    generator, cuda = torch.Generator("cuda").manual_seed(0), torch.device("cuda")
    weights = [torch.randn(64, 512, device=cuda, generator=generator) for _ in range(5)]
    statistics = InputStatistics(512, 0, cuda)
    statistics.add(torch.randn(1024, 512, device=cuda, generator=generator))
    moments, steps = with_inverses(statistics.moments(), scheme), ("clip", "compensate", "descend")
    alone = [rounded_weight(weight, scheme, moments, steps) for weight in weights]
    with recorded_launches():
        together = [rounded_weight(weight, scheme, moments, steps) for weight in weights]
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.codes_OI, other.codes_OI) and torch.equal(one.dequantize(), other.dequantize())
