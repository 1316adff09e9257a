"""Hashes that are made while bytes are written."""

import hashlib
import random
from pathlib import Path

from dsquant.files.disk import joined
from dsquant.files.hashing import BYTES_AT_ONCE, FileHashes, OrderedHash

CONTENT = random.Random(0).randbytes(BYTES_AT_ONCE + 1000)


def test_a_file_written_in_any_order_has_its_hash_when_it_is_whole(tmp_path: Path) -> None:
    hashes, parts = FileHashes(), list(range(0, len(CONTENT), 70_000))
    random.Random(1).shuffle(parts)
    path = tmp_path / "weights.partial"
    path.write_bytes(bytes(len(CONTENT)))
    with path.open("r+b", buffering=0) as file:
        for start in parts:
            assert hashes.whole() == {}
            file.seek(start)
            stop = start + file.write(CONTENT[start : start + 70_000])
            hashes.written(path, "weights", start, stop)
    path.rename(tmp_path / "weights")
    expected = {"bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    assert hashes.whole() == {tmp_path / "weights": expected}
    hashes.close()


def test_a_file_that_is_cut_off_meanwhile_has_no_hash(tmp_path: Path) -> None:
    hashes, path = FileHashes(), tmp_path / "weights"
    path.write_bytes(b"")
    hashes.written(path, "weights", 0, 100)
    assert hashes.whole() == {}
    hashes.close()


def test_parts_out_of_order_are_counted_and_not_hashed() -> None:
    whole, mixed = OrderedHash(), OrderedHash()
    for start in (0, 5):
        whole.add(start, memoryview(CONTENT[start : start + 5]))
        mixed.add(5 - start, memoryview(CONTENT[5 - start : 10 - start]))
    assert whole.of(10) == hashlib.sha256(CONTENT[:10]).hexdigest() and mixed.of(10) == ""
    assert whole.num_bytes == mixed.num_bytes == 10


def test_extents_that_touch_are_joined() -> None:
    assert joined([(5, 7), (0, 2), (2, 5), (9, 9)]) == [(0, 7), (9, 9)]
