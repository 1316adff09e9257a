"""Writing behind: order, threads, errors."""

from threading import Event, current_thread

import pytest
import torch

from dsquant.formats.write_behind import WriteBehind


def test_what_is_written_behind_arrives_in_order_in_one_thread() -> None:
    behind, seen = WriteBehind(), list[tuple[int, str]]()
    for number in range(50):
        behind.write((torch.tensor(number),), lambda tensor: seen.append((int(tensor), current_thread().name)))
    behind.wait()
    behind.close()
    assert [number for number, _ in seen] == list(range(50))
    assert len({name for _, name in seen}) == 1 and seen[0][1] != current_thread().name


def test_each_sink_behind_gets_everything_in_order_and_none_waits_for_another() -> None:
    behind, seen, go = WriteBehind(), {"slow": list[int](), "fast": list[int]()}, Event()

    def slow(number: torch.Tensor, _: torch.Tensor) -> None:
        go.wait(60)
        seen["slow"].append(int(number))

    def fast(number: torch.Tensor, square: torch.Tensor) -> None:
        assert int(square) == int(number) ** 2
        seen["fast"].append(int(number))
        if int(number) == 9:
            go.set()  # which `slow` waits for

    for number in range(10):
        behind.write((torch.tensor(number), torch.tensor(number**2)), slow, fast)
    behind.wait()
    behind.close()
    assert seen == {"slow": list(range(10)), "fast": list(range(10))}


def test_an_error_behind_comes_out_at_the_next_wait() -> None:
    def fail(_: torch.Tensor) -> None:
        raise OSError("no space left")

    behind = WriteBehind()
    behind.write((torch.tensor(0),), fail)
    with pytest.raises(OSError, match="no space left"):
        behind.wait()
    behind.close()
