"""The types of ggml whose weights share points of a code book: beside ggml's own search, decoded by gguf-py."""

import gguf as gguf_py
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from dsquant.kernels import code_book_neighbours, code_book_search, code_books, ggml

NUMBERS = {name: gguf_py.GGMLQuantizationType[name] for name in code_books.TYPES}
QUICK = ("IQ3_XXS", "IQ3_S")  # ggml takes seconds to prepare the others


def weights(heavy: bool, num_rows: int = 8, num_columns: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, and importances of their columns that differ by e squared."""
    generator = torch.Generator().manual_seed(int(heavy))
    rows_RI = torch.randn(num_rows, num_columns, generator=generator) * 0.02
    if heavy:
        rows_RI *= (0.7 * torch.randn(num_rows, num_columns, generator=generator)).exp()
    return rows_RI, torch.randn(num_columns, generator=generator).exp()


def decoded(stored: torch.Tensor, type_name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(dequantize(stored.cpu().numpy(), NUMBERS[type_name]), dtype=np.float32))


def weighted_error(stored: torch.Tensor, type_name: str, rows_RI: torch.Tensor, importance_I: torch.Tensor) -> float:
    """By the weights that ggml gives the columns, relative to the rows."""
    squares = rows_RI.unflatten(1, (-1, 256)).square()
    spread = code_books.TYPES[type_name].spread
    weights_RI = importance_I * (spread * squares.mean(2, keepdim=True) + squares).sqrt().flatten(1)
    errors_RI = decoded(stored, type_name) - rows_RI
    return float((weights_RI * errors_RI.square()).sum() / (weights_RI * rows_RI.square()).sum()) ** 0.5


def assert_less_error_than_ggml(type_name: str, heavy: bool) -> None:
    rows_RI, importance_I = weights(heavy)
    ours, theirs = (
        weighted_error(quantize(rows_RI, type_name, importance_I), type_name, rows_RI, importance_I)
        for quantize in (code_book_search.quantize, ggml.quantize)
    )
    assert ours < 0.97 * theirs


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("type_name", QUICK)
def test_neighbours_tried_by_weight_leave_less_error_than_ggmls(type_name: str, heavy: bool) -> None:
    assert_less_error_than_ggml(type_name, heavy)


@pytest.mark.slow
@pytest.mark.parametrize("type_name", [name for name in code_books.TYPES if name not in QUICK])
def test_neighbours_leave_less_error_where_ggml_prepares_long(type_name: str) -> None:
    assert_less_error_than_ggml(type_name, True)


@pytest.mark.parametrize(
    ("type_name", "shift"),
    [(name, shift) for name in code_books.TYPES for shift in range(len(code_books.shifts_of(name)))],
)
def test_the_neighbours_of_a_vector_hold_almost_the_best_of_all_points(type_name: str, shift: int) -> None:
    points_KP = code_books.points_of(type_name).flatten(0, 1)
    points_KP = points_KP.unflatten(0, (len(code_books.shifts_of(type_name)), -1))[shift]
    width, kind = points_KP.shape[1], code_books.TYPES[type_name]
    values_EGP = torch.randn(400, 8 // width, width, generator=torch.Generator().manual_seed(1))
    weights_EGP = torch.randn(values_EGP.shape, generator=torch.Generator().manual_seed(2)).exp()
    scale_E = torch.rand(400, generator=torch.Generator().manual_seed(3)) + 0.5 * values_EGP.abs().mean((1, 2))
    scale_E /= points_KP.abs().mean()
    found = code_book_neighbours.nearest(values_EGP, weights_EGP, scale_E, shift, type_name)
    found_E, kept = found.error_EG.sum(1), ~found.flipped_EG.any(1)  # the best of all points has the values' signs
    tried = values_EGP if kind.signs == "delta" else values_EGP.abs()
    constant_E = (weights_EGP * tried.square()).sum((1, 2))
    errors_EGK = (weights_EGP.unsqueeze(2) * (tried.unsqueeze(2) - points_KP * scale_E.view(-1, 1, 1, 1)).square()).sum(
        3
    )
    best_E = errors_EGK.amin(2).sum(1)
    assert bool((found_E + constant_E >= best_E * (1 - 1e-4) - 1e-5).all())
    assert float((found_E + constant_E)[kept].sum() / best_E[kept].sum()) < 1.003


@pytest.mark.parametrize("type_name", ["IQ2_XXS", "IQ2_XS", "IQ3_XXS"])
def test_an_odd_sign_is_given_up_where_it_costs_least(type_name: str) -> None:
    points_KP = code_books.points_of(type_name)[0]
    width = points_KP.shape[1]
    values_EGP = torch.randn(300, 8 // width, width, generator=torch.Generator().manual_seed(1))
    values_EGP = values_EGP[(values_EGP < 0).sum((1, 2)) % 2 == 1]
    weights_EGP = torch.randn(values_EGP.shape, generator=torch.Generator().manual_seed(2)).exp()
    scale_E = values_EGP.abs().mean((1, 2)) / points_KP.abs().mean()
    found = code_book_neighbours.nearest(values_EGP, weights_EGP, scale_E, 0, type_name)
    assert torch.equal(found.flipped_EG.sum(1), torch.ones(len(values_EGP), dtype=torch.int64))

    def least(tried_EGP: torch.Tensor) -> torch.Tensor:
        missed_EGKP = tried_EGP.unsqueeze(2) - points_KP * scale_E.view(-1, 1, 1, 1)
        return (weights_EGP.unsqueeze(2) * missed_EGKP.square()).sum(3).amin(2)

    tried_EGP, places_P = values_EGP.abs(), torch.arange(width)
    with_signs_EG = least(tried_EGP)
    flipped_EG = torch.stack([least(torch.where(places_P == place, -tried_EGP, tried_EGP)) for place in places_P]).amin(
        0
    )
    best_E = with_signs_EG.sum(1) + (flipped_EG - with_signs_EG).amin(1)
    found_E = found.error_EG.sum(1) + (weights_EGP * values_EGP.square()).sum((1, 2))
    assert bool((found_E >= best_E * (1 - 1e-4) - 1e-5).all())
    assert float(found_E.sum() / best_E.sum()) < 1.005


@pytest.mark.parametrize("type_name", code_books.TYPES)
def test_stored_bytes_decode_to_the_points_that_were_chosen(type_name: str) -> None:
    rows_RI, importance_I = weights(True, 2, 512)
    rows_RI[0, :256], rows_RI[1, 40] = 0, -3.0
    kind, points_AKP = code_books.TYPES[type_name], code_books.points_of(type_name)
    importance_SW = importance_I.expand(2, -1).reshape(-1, 256)
    vectors = code_books.vectors_of(rows_RI.view(-1, 256), importance_SW, type_name)
    chosen = code_book_search.search(vectors)
    scale_N = (2 * chosen.level_N + 1) * chosen.factor_S.float().repeat_interleave(256 // kind.block)
    points_NGP = points_AKP[chosen.alternative_N.unsqueeze(1), chosen.index_NG]
    values_RI = decoded(code_book_search.quantize(rows_RI, type_name, importance_I), type_name)
    found_NGP = values_RI.view(vectors.weight_NGP.shape)
    wanted_NGP = points_NGP * scale_N.view(-1, 1, 1)
    if kind.signs != "delta":
        found_NGP = found_NGP.abs()
    assert torch.allclose(found_NGP, wanted_NGP, rtol=1e-6)
    assert bool((values_RI[0, :256] == 0).all())


@pytest.mark.parametrize("type_name", ["IQ2_XXS", "IQ2_XS", "IQ3_XXS"])
def test_eight_signs_have_an_even_number_of_minus_and_few_are_given_up(type_name: str) -> None:
    rows_RI, importance_I = weights(False, 2, 512)
    values_RI = decoded(code_book_search.quantize(rows_RI, type_name, importance_I), type_name)
    minus = (values_RI < 0).unflatten(1, (-1, 8))
    differs = (values_RI < 0) != (rows_RI < 0)
    assert bool((minus.sum(2) % 2 == 0).all())
    assert int(differs.unflatten(1, (-1, 8)).sum(2).max()) == 1


@given(st.integers(0, 2**32 - 1), st.sampled_from(["IQ2_XXS", "IQ2_S", "IQ3_S"]), st.floats(-4, 3))
@settings(max_examples=10, deadline=None)
def test_rows_of_any_size_keep_their_shape_of_error(seed: int, type_name: str, exponent: float) -> None:
    rows_RI = torch.randn(1, 256, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    values_RI = decoded(code_book_search.quantize(rows_RI, type_name, torch.ones(256)), type_name)
    assert float((values_RI - rows_RI).norm() / rows_RI.norm()) < 0.38


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here, see the test for a GPU")
@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_S", "IQ3_XXS"])
def test_the_gpus_search_chooses_as_well_under_tritons_interpreter(name: str) -> None:
    from dsquant.kernels import code_books_triton

    weight_SW = torch.randn(2, 256, generator=torch.Generator().manual_seed(3)) * 0.02
    weight_SW[1, :64] = 0
    importance_SW = torch.randn(256, generator=torch.Generator().manual_seed(4)).exp().expand(2, -1)
    vectors, points = code_books.vectors_of(weight_SW, importance_SW, name), code_books.points_of(name)

    def error(chosen: code_books.Chosen) -> float:
        scale_N = (2 * chosen.level_N + 1) * chosen.factor_S.float().repeat_interleave(256 // vectors.kind.block)
        points_NGP = points[chosen.alternative_N.unsqueeze(1), chosen.index_NG] * scale_N.view(-1, 1, 1)
        values_NGP = vectors.weight_NGP if vectors.kind.signs == "delta" else vectors.weight_NGP.abs()
        return float((vectors.importance_NGP * (values_NGP - points_NGP).square()).sum())

    wanted, found = code_book_search.search(vectors), code_books_triton.search(vectors)
    assert abs(error(found) / error(wanted) - 1) < 1e-2  # sums are formed in another order
    assert float((wanted.negative_NGP == found.negative_NGP).float().mean()) > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("type_name", code_books.TYPES)
def test_a_gpu_chooses_what_the_reference_chooses(type_name: str) -> None:
    from dsquant.kernels import code_books_triton

    rows_RI, importance_I = (part.cuda() for part in weights(True, 16, 2048))
    importance_SW = importance_I.expand(16, -1).reshape(-1, 256)
    vectors = code_books.vectors_of(rows_RI.view(-1, 256), importance_SW, type_name)
    wanted, found = code_book_search.search(vectors), code_books_triton.search(vectors)
    assert float((wanted.index_NG == found.index_NG).float().mean()) > 0.995
    errors = [
        weighted_error(stored, type_name, rows_RI.cpu(), importance_I.cpu())
        for stored in (
            code_books_triton.quantize(rows_RI, type_name, importance_I),
            code_book_search.quantize(rows_RI.cpu(), type_name, importance_I.cpu()),
        )
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
