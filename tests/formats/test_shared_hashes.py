"""Hashes of tensors that several ranks write (gloo on the CPU), made while they write."""

import hashlib
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ranks import call, finish

from dsquant.errors import InputError
from dsquant.files.disk import write_at
from dsquant.formats.gguf.shared_hashes import RECORD, SharedHashes
from dsquant.jobs.ranks import Ranks

PART = 1000
# Behind the header of a file: the parts of each tensor.
HEADER, PARTS = 64, 24
NAMES = ["gate", "up", "down"]


def content(name: str) -> bytes:
    return random.Random(name).randbytes(PART * PARTS)


@contextmanager
def opened(ranks: Ranks, folder: Path) -> Iterator[SharedHashes]:
    """The hashes of tensors in a file of zeros."""
    path = folder / "tensors"
    ranks.once(lambda: path.write_bytes(bytes(HEADER + PART * PARTS * len(NAMES))))
    with path.open("r+b", buffering=0) as file:
        places = {name: (file, HEADER + PART * PARTS * number, PART * PARTS) for number, name in enumerate(NAMES)}
        hashes = SharedHashes(ranks, folder, places)
        yield hashes
        hashes.close()


def write(hashes: SharedHashes, ranks: Ranks, folder: Path, name: str, told: bool = True) -> None:
    """Writes this rank's parts of a tensor, of which the ranks have one each in turn; the later ones first."""
    begin, raw = HEADER + PART * PARTS * NAMES.index(name), content(name)
    with (folder / "tensors").open("r+b", buffering=0) as file:
        for start in reversed(range(ranks.rank * PART, len(raw), ranks.size * PART)):
            write_at(file.fileno(), memoryview(raw)[start : start + PART], begin + start)
            if told:
                hashes.written(name, begin + start, begin + start + PART)


def wanted(*names: str) -> dict[str, str]:
    return {name: hashlib.sha256(content(name)).hexdigest() for name in names}


def test_three_ranks_get_the_hashes_of_tensors_that_all_have_written(tmp_path: Path) -> None:
    def check(ranks: Ranks) -> None:
        with opened(ranks, tmp_path) as hashes:
            for names in (["up"], ["down", "gate"]):
                for name in names:
                    write(hashes, ranks, tmp_path, name)
                ranks.barrier()
                assert hashes.of(names) == wanted(*names)

    finish(call(3, check))
    assert [path.name for path in tmp_path.iterdir()] == ["tensors"]


def test_a_tensor_is_hashed_while_ranks_write_and_not_at_the_end(tmp_path: Path) -> None:
    def check(ranks: Ranks) -> None:
        for patience in (0.2, 1, 5, 25):
            with opened(ranks, tmp_path) as hashes:
                write(hashes, ranks, tmp_path, "up")
                ranks.barrier()
                time.sleep(patience)
                ranks.once(lambda: (tmp_path / "tensors").write_bytes(bytes(HEADER + PART * PARTS * len(NAMES))))
                if hashes.of(["up"]) == wanted("up"):  # of what is there no more
                    return
        raise AssertionError("nobody has followed")

    finish(call(2, check))


def test_what_no_rank_has_told_of_is_hashed_when_it_is_whole(tmp_path: Path) -> None:
    def check(ranks: Ranks) -> None:
        with opened(ranks, tmp_path) as hashes:
            for name in NAMES:
                write(hashes, ranks, tmp_path, name, told=name == "up" and not ranks.first)
            ranks.barrier()
            assert hashes.of(NAMES) == wanted(*NAMES)

    finish(call(2, check))


def test_what_an_earlier_run_has_told_is_not_believed(tmp_path: Path) -> None:
    for rank in range(4):
        whole = (RECORD.pack(number, HEADER, HEADER + PART * PARTS * len(NAMES)) for number in range(len(NAMES)))
        (tmp_path / f"written-{rank}").write_bytes(b"".join(whole))

    def check(ranks: Ranks) -> None:
        with opened(ranks, tmp_path) as hashes:
            time.sleep(0.3)  # in which it would be read
            for name in NAMES:
                write(hashes, ranks, tmp_path, name)
            ranks.barrier()
            assert hashes.of(NAMES) == wanted(*NAMES)

    finish(call(2, check))


def test_a_file_that_is_cut_off_meanwhile_stops_all_ranks_when_a_hash_is_asked_for(tmp_path: Path) -> None:
    def check(ranks: Ranks) -> None:
        with opened(ranks, tmp_path) as hashes:
            ranks.once(lambda: os.truncate(tmp_path / "tensors", HEADER + PART))
            hashes.written("gate", HEADER, HEADER + PART * PARTS)
            ranks.barrier()
            time.sleep(0.1)
            with pytest.raises(InputError, match="tensors: gate was cut off"):
                hashes.of(["gate"])

    finish(call(2, check))
