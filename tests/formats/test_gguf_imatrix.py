"""Importance matrices: written, read, shrunk, refused."""

import struct
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
import torch
from gguf_files import CALIBRATED, tensors_of

import dsquant
from dsquant.errors import InputError
from dsquant.formats.gguf.files import GgufTensor
from dsquant.formats.gguf.imatrix import (
    LEAST_SHARE,
    TensorImportance,
    column_importance,
    fitting_imatrix,
    read_imatrix,
    write_imatrix,
)
from dsquant.formats.gguf.store import decoded_rows, stored_rows

# --- importance matrices


def test_an_imatrix_file_returns_what_was_written(tmp_path: Path) -> None:
    entries = {
        "blk.0.attn_q_a.weight": TensorImportance(torch.rand(1, 64), torch.tensor([10.0])),
        "blk.1.ffn_up_exps.weight": TensorImportance(torch.rand(4, 64), torch.tensor([3.0, 0.0, 9.0, 1.0])),
    }
    write_imatrix(tmp_path / "imatrix.gguf", entries, ["mix"], 8, 512)
    found = read_imatrix(tmp_path / "imatrix.gguf")
    assert set(found) == set(entries)
    for name, entry in entries.items():
        assert torch.equal(found[name].sums_MI, entry.sums_MI) and torch.equal(found[name].counts_M, entry.counts_M)
    fields = gguf_py.GGUFReader(tmp_path / "imatrix.gguf").fields
    assert fields["general.type"].contents() == "imatrix" and fields["imatrix.chunk_size"].contents() == 512
    assert "general.architecture" not in fields


def test_rare_experts_shrink_towards_their_tensor_and_no_column_counts_nothing() -> None:
    sums_MI = torch.ones(3, 8) * torch.tensor([[1000.0], [0.0], [6.0]])
    sums_MI[0, 3] = 0.0
    entry = TensorImportance(sums_MI, torch.tensor([1000.0, 0.0, 2.0]))
    found = column_importance(entry)
    assert bool((found > 0).all()) and float(found[0, 3]) < 0.1
    pooled = float(sums_MI[:, 0].sum() / 1002)
    assert float(found[1, 0]) == pytest.approx(pooled)
    assert pooled < float(found[2, 0]) < 3.0 and float(found[2, 0]) - pooled < 0.2
    assert float(found[0, 0]) == pytest.approx(1.0, rel=0.01)
    single = column_importance(TensorImportance(torch.tensor([[4.0, 0.0]]), torch.tensor([2.0])))
    assert float(single[0, 0]) == 2.0 and float(single[0, 1]) == pytest.approx(LEAST_SHARE)
    unseen = column_importance(TensorImportance(torch.zeros(1, 4), torch.zeros(1)))
    assert torch.equal(unseen, torch.ones(1, 4))


@pytest.mark.slow
def test_the_written_imatrix_makes_the_same_file_as_the_calibration_itself(
    nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    options = CALIBRATED | {"samples": 24, "seq_len": 64}
    dsquant.gguf(nano_r1, type="Q4_K_M", output=tmp_path / "a", calibration=str(text_file), scales=False, **options)
    dsquant.gguf(
        nano_r1, type="Q4_K_M", output=tmp_path / "b", imatrix=tmp_path / "a" / "imatrix.gguf",
        evaluate=False, progress=False,
    )  # fmt: skip
    first, second = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    for name in (
        "blk.1.attn_k_b.weight",
        "blk.1.attn_v_b.weight",
        "blk.1.attn_q_a.weight",
        "blk.1.ffn_up_shexp.weight",
    ):
        assert np.array_equal(first[name].data, second[name].data), name
    entry = read_imatrix(tmp_path / "a" / "imatrix.gguf")["blk.1.ffn_down_exps.weight"]
    assert entry.sums_MI.shape == (4, 192) and bool((entry.counts_M >= 256).all())


def legacy_imatrix(path: Path, entries: dict[str, list[float]], calls: int) -> Path:
    raw = struct.pack("<i", len(entries))
    for name, values in entries.items():
        encoded = name.encode()
        raw += struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, len(values))
        raw += struct.pack(f"<{len(values)}f", *values)
    path.write_bytes(raw)
    return path


def test_the_older_imatrix_format_is_read_too(tmp_path: Path) -> None:
    path = legacy_imatrix(tmp_path / "imatrix.dat", {"blk.0.attn_q_a.weight": [3.0, 6.0]}, calls=3)
    assert column_importance(read_imatrix(path)["blk.0.attn_q_a.weight"]).tolist() == [[1.0, 2.0]]


def test_an_imatrix_of_another_model_is_refused_by_name_and_shape(tiny_r1: Path, tmp_path: Path) -> None:
    other = legacy_imatrix(tmp_path / "other.dat", {"blk.0.attn_q_a.weight": [1.0] * 128}, calls=1)
    with pytest.raises(InputError, match=r"other\.dat.*blk\.0\.attn_q_a\.weight.*128 values.*another model"):
        dsquant.gguf(tiny_r1, type="Q4_K_M", output=tmp_path / "out", imatrix=other, progress=False)
    deeper = legacy_imatrix(tmp_path / "deep.dat", {"blk.50.attn_q_a.weight": [1.0] * 256}, calls=1)
    with pytest.raises(InputError, match=r"blk\.50.*not in this model"):
        dsquant.gguf(tiny_r1, type="Q4_K_M", output=tmp_path / "out", imatrix=deeper, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [0, 3, 20, 200])
def test_a_corrupt_imatrix_is_refused(tiny_r1: Path, tmp_path: Path, cut: int) -> None:
    write_imatrix(
        tmp_path / "good.gguf", {"blk.0.attn_q_a.weight": TensorImportance(torch.ones(1, 256), torch.ones(1))}, [], 1, 1
    )
    (tmp_path / "bad.gguf").write_bytes((tmp_path / "good.gguf").read_bytes()[:cut])
    with pytest.raises(InputError, match=r"bad\.gguf"):
        dsquant.gguf(tiny_r1, type="Q4_K_M", output=tmp_path / "out", imatrix=tmp_path / "bad.gguf", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_imatrix_with_values_that_cannot_be_is_refused(tiny_r1: Path, tmp_path: Path) -> None:
    path = legacy_imatrix(tmp_path / "nan.dat", {"blk.0.attn_q_a.weight": [float("nan")] * 256}, calls=1)
    with pytest.raises(InputError, match="not finite"):
        dsquant.gguf(tiny_r1, type="Q4_K_M", output=tmp_path / "out", imatrix=path, progress=False)


@pytest.mark.parametrize("columns", [slice(None), slice(3, 4)], ids=["all", "one"])
def test_importances_near_the_largest_float_are_of_use(columns: slice, tmp_path: Path) -> None:
    sums_MI = torch.zeros(1, 96)
    sums_MI[:, columns] = 3e38
    write_imatrix(tmp_path / "huge.gguf", {"a": TensorImportance(sums_MI, torch.ones(1))}, [], 1, 1)
    found, _ = fitting_imatrix(tmp_path / "huge.gguf", {"a": GgufTensor("a", "IQ4_NL", (4, 96))})
    rows_RI = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    stored = stored_rows(rows_RI, "IQ4_NL", column_importance(found["a"])[0])
    assert float((decoded_rows(stored, "IQ4_NL") - rows_RI).norm() / rows_RI.norm()) < 0.2
