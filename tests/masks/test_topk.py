"""The k largest scores equal those of a sort, also with ties and special floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rosa_kernels.masks import topk
from rosa_kernels.masks.topk import Pool, chunk_elements, pattern_of, top_k


def by_sorting(scores: Tensor, k: int, signed: bool = False) -> list[int]:
    """The definition: sort by descending score, then by place, and take the first k places."""
    flat = scores.float().flatten().tolist()
    rank = flat if signed else [abs(x) for x in flat]
    return sorted(sorted(range(len(flat)), key=lambda i: (-rank[i], i))[:k])


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
# Few distinct values, which make ties. They include -0.0, subnormals and the largest numbers.
tied = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 2.0, 3.4e38, -3.4e38, 1.1754944e-38])


@given(data=st.data(), signed=st.booleans(), n=st.integers(1, 7))
def test_top_k_matches_sorting(data: st.DataObject, signed: bool, n: int) -> None:
    flat = data.draw(st.lists(st.one_of(finite, tied), max_size=60))
    scores = torch.tensor(flat[: len(flat) // n * n], dtype=torch.float32).view(-1, n)
    k = data.draw(st.integers(0, scores.numel()))
    assert top_k(scores, k, signed=signed).tolist() == by_sorting(scores, k, signed)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("k", [0, 1, 500, 9_999, 30_000, 37_999, 38_000])
def test_top_k_over_many_chunks(k: int, signed: bool) -> None:
    scores = torch.randn(200, 190, generator=torch.Generator().manual_seed(k))
    scores = (scores * 50).round() / 50  # a few hundred distinct values: ties at every cut
    assert scores.numel() > 5 * chunk_elements(scores.numel())
    assert top_k(scores, k, signed=signed).tolist() == by_sorting(scores, k, signed)


def test_equal_scores_take_the_first_places() -> None:
    for value in (0.0, -0.0, 3.0, 1e-45):
        assert top_k(torch.full((90, 100), value), 4567).equal(torch.arange(4567))


def test_distinct_scores_agree_with_torch() -> None:
    scores = torch.randperm(300 * 400, generator=torch.Generator().manual_seed(0)).float()
    expected = scores.topk(777).indices.sort().values
    assert top_k(scores.view(300, 400), 777).equal(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_compared_in_float32(dtype: torch.dtype) -> None:
    scores = torch.randn(50, 60, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert top_k(scores, 100).tolist() == by_sorting(scores, 100)


def test_transposed_matrix_gives_row_major_places() -> None:
    stored = torch.randn(120, 70, generator=torch.Generator().manual_seed(4))
    assert top_k(stored.T, 333).equal(top_k(stored.T.contiguous(), 333))


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("signed", [False, True])
def test_scores_that_are_not_finite_are_refused(bad: float, signed: bool) -> None:
    scores = torch.ones(60, 100)
    scores[41, 3] = bad
    with pytest.raises(ValueError, match="expected finite scores of 'q_proj', got NaN or infin"):
        top_k(scores, 5, signed=signed, what="scores of 'q_proj'")
    pool = Pool(10_000, ["a", "b"], signed=signed)
    pool.add("a", torch.ones(2, 3))
    with pytest.raises(ValueError, match="expected finite scores of 'b'"):
        pool.add("b", scores)


def test_bad_arguments_are_refused() -> None:
    for k in (-1, 7):
        with pytest.raises(ValueError, match=rf"expected k in \[0, 6\] for scores, got {k}"):
            top_k(torch.zeros(2, 3), k)
    with pytest.raises(ValueError, match=r"of shape \(m, n\), got \(6,\)"):
        top_k(torch.zeros(6), 1)
    with pytest.raises(TypeError, match=r"of a floating dtype, got torch\.int64"):
        top_k(torch.zeros(2, 3, dtype=torch.int64), 1)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    places = top_k(torch.zeros(shape), 0)
    assert pattern_of(places, shape).nnz == 0


def test_pattern_of_turns_places_into_a_pattern() -> None:
    mask = torch.rand(13, 17, generator=torch.Generator().manual_seed(1)) < 0.2
    places = mask.flatten().nonzero().flatten()
    before = places.clone()
    pattern = pattern_of(places, (13, 17))
    assert pattern.to_torch(torch.ones(pattern.nnz)).to_dense().bool().equal(mask)
    assert places.equal(before)


def test_chunks_are_a_fraction_of_the_matrix() -> None:
    for numel in (4096 * 64, 576 * 1536, 4096 * 11008):
        assert chunk_elements(numel) <= min(numel // 64, 2**20)


def merged(matrices: dict[str, Tensor], k: int, signed: bool) -> dict[str, list[int]]:
    """The pool's definition: one sort over all matrices, with ties in their order."""
    rows = [
        (-(value if signed else abs(value)), index, place)
        for index, scores in enumerate(matrices.values())
        for place, value in enumerate(scores.flatten().tolist())
    ]
    found: dict[str, list[int]] = {name: [] for name in matrices}
    for _, index, place in sorted(rows)[:k]:
        found[list(matrices)[index]].append(place)
    return {name: sorted(places) for name, places in found.items()}


@given(data=st.data(), signed=st.booleans())
def test_pool_matches_sorting_in_any_order(data: st.DataObject, signed: bool) -> None:
    sizes = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    values = st.one_of(finite, tied)
    matrices = {
        str(i): torch.tensor(data.draw(st.lists(values, min_size=s, max_size=s))).view(1, s)
        for i, s in enumerate(sizes)
    }
    k = data.draw(st.integers(0, sum(sizes)))
    pool = Pool(k, list(matrices), signed=signed)
    for name in data.draw(st.permutations(list(matrices))):
        pool.add(name, matrices[name])
    places = {name: found.tolist() for name, found in pool.places().items()}
    assert places == merged(matrices, k, signed)


def test_pool_of_transposed_and_bfloat16_matrices() -> None:
    generator = torch.Generator().manual_seed(7)
    matrices = {
        "a": torch.randn(80, 90, generator=generator).T,
        "b": torch.randn(110, 95, generator=generator).to(torch.bfloat16),
        "c": torch.randn(70, 70, generator=generator) * 3,
    }
    pool = Pool(1500, ["a", "b", "c"])
    for name in ("c", "a", "b"):
        pool.add(name, matrices[name])
    places = {name: found.tolist() for name, found in pool.places().items()}
    assert places == merged(matrices, 1500, signed=False)
    assert sum(len(found) for found in places.values()) == 1500


def test_pool_keeps_at_most_k_entries() -> None:
    pool = Pool(100, ["a", "b"])
    pool.add("b", torch.rand(50, 60))
    pool.add("a", torch.rand(50, 60))
    kept = [entry for entry in pool._kept.values() if entry is not None]
    assert sum(values.numel() for values, _ in kept) == 100
    for values, places in kept:
        # Views would keep the (m, n) scores alive.
        assert values.untyped_storage().nbytes() == 4 * values.numel()
        assert places.untyped_storage().nbytes() == 4 * places.numel()
        assert places.dtype == torch.int32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_device_gives_the_same_places() -> None:
    scores = (torch.randn(700, 900) * 20).round()
    here, there = top_k(scores, 5000), top_k(scores.cuda(), 5000)
    assert there.is_cuda
    assert there.cpu().equal(here)


def test_histogram_shifts_cover_32_bits() -> None:
    widths = [math.ceil(math.log2(bins)) for bins in topk._BINS]
    assert sum(widths) == 32
    assert [sum(widths[i + 1 :]) for i in range(3)] == list(topk._SHIFTS)
