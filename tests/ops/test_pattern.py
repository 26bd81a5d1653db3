"""CsrPattern: construction, derived structure, movement, copies and inference mode."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import sweep
from torch import Tensor

import rosa_kernels as rk
from rosa_kernels import CsrPattern
from rosa_kernels.testing import NASTY, uniform_pattern

INDEX_DTYPES = [torch.int32, torch.int64]
HUGE = 2**31


def same(a: CsrPattern, b: CsrPattern) -> bool:
    return (
        a.shape == b.shape
        and torch.equal(a.crow_indices, b.crow_indices)
        and torch.equal(a.col_indices, b.col_indices)
    )


def mask_of(pattern: CsrPattern) -> Tensor:
    return pattern.to_torch(torch.ones(pattern.nnz)).to_dense() != 0


# -- construction --------------------------------------------------------------------------------


@pytest.mark.parametrize("crow_dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("col_dtype", INDEX_DTYPES, ids=str)
def test_integer_index_tensors_become_int32(
    crow_dtype: torch.dtype, col_dtype: torch.dtype
) -> None:
    crow, col = (
        torch.tensor([0, 2, 2, 3], dtype=crow_dtype),
        torch.tensor([1, 3, 0], dtype=col_dtype),
    )
    pattern = CsrPattern(crow, col, (3, 4))
    assert pattern.crow_indices.dtype == pattern.col_indices.dtype == torch.int32
    assert pattern.crow_indices.tolist() == [0, 2, 2, 3]
    assert pattern.col_indices.tolist() == [1, 3, 0]
    assert (pattern.nnz, pattern.shape, pattern.density) == (3, (3, 4), 0.25)
    assert repr(pattern) == "CsrPattern(3 x 4, nnz=3, density=25.000%, device='cpu')"


def test_int32_index_tensors_are_not_copied() -> None:
    crow = torch.tensor([0, 1], dtype=torch.int32)
    assert CsrPattern(crow, torch.zeros(1, dtype=torch.int32), (1, 1)).crow_indices is crow


def test_memory_of_numpy_is_copied() -> None:
    """A write into the array changes no version counter. Kernels would read out of bounds."""
    crow, col = np.array([0, 1, 2], np.int32), np.array([0, 1], np.int32)
    for borrow in (torch.from_numpy, torch.from_dlpack, torch.as_tensor):
        pattern = CsrPattern(borrow(crow), borrow(col), (2, 2))
        col[:] = 10**6
        assert pattern.col_indices.tolist() == [0, 1]
        col[:] = 0, 1


def test_strided_index_tensors_become_contiguous() -> None:
    crow = torch.arange(0, 10, 2, dtype=torch.int32)[::2] // 4
    col = torch.zeros(1, dtype=torch.int32).expand(2)
    pattern = CsrPattern(crow, col, (2, 5))
    assert pattern.crow_indices.is_contiguous()
    assert pattern.col_indices.is_contiguous()
    assert mask_of(pattern).nonzero().tolist() == [[0, 0], [1, 0]]


@sweep(nasty=NASTY)
def test_from_mask_takes_any_dtype(nasty: CsrPattern) -> None:
    mask = mask_of(nasty)
    for dense in (mask, mask.to(torch.uint8), mask * -0.5, mask.T.contiguous().T, mask * torch.nan):
        expected = (dense != 0) if dense.dtype.is_floating_point else mask
        assert same(CsrPattern.from_mask(dense), CsrPattern.from_mask(expected))
        assert torch.equal(mask_of(CsrPattern.from_mask(dense)), expected)


@sweep(nasty=NASTY)
def test_from_coo_takes_any_order(nasty: CsrPattern) -> None:
    shuffled = torch.randperm(nasty.nnz, generator=torch.Generator().manual_seed(0))
    rows, cols = nasty.row_indices[shuffled], nasty.col_indices[shuffled]
    assert same(CsrPattern.from_coo(rows, cols, nasty.shape), nasty)
    assert same(CsrPattern.from_coo(rows.long(), cols.long(), nasty.shape), nasty)


@sweep(nasty=NASTY)
def test_torch_round_trip(nasty: CsrPattern) -> None:
    values = torch.randn(nasty.nnz)
    matrix = nasty.to_torch(values)
    assert matrix.layout is torch.sparse_csr
    assert torch.equal(matrix.values(), values)
    assert same(CsrPattern.from_torch(matrix), nasty)


@sweep(nasty=NASTY, form=["csr_array", "csc_array", "coo_array", "csr_matrix"])
def test_scipy_round_trip(nasty: CsrPattern, form: str) -> None:
    rows, cols = nasty.row_indices.numpy(), nasty.col_indices.numpy()
    matrix = getattr(scipy.sparse, form)(
        scipy.sparse.coo_array((np.ones(nasty.nnz), (rows, cols)), shape=nasty.shape)
    )
    assert same(CsrPattern.from_scipy(matrix), nasty)


def test_scipy_matrices_are_made_canonical() -> None:
    """The matrix has unsorted columns, a duplicate and a stored zero. It is not changed."""
    columns = np.array([2, 0, 2, 1])
    matrix = scipy.sparse.csr_array((np.array([1.0, 2.0, -1.0, 0.0]), columns, [0, 3, 4]), (2, 3))
    pattern = CsrPattern.from_scipy(matrix)
    assert pattern.crow_indices.tolist() == [0, 2, 3]
    assert pattern.col_indices.tolist() == [0, 2, 1]
    assert matrix.indices.tolist() == [2, 0, 2, 1]


def test_the_greatest_column_index_is_accepted() -> None:
    pattern = CsrPattern(torch.tensor([0, 1]), torch.tensor([HUGE - 2]), (1, HUGE - 1))
    assert pattern.col_indices.tolist() == [HUGE - 2]
    assert CsrPattern.from_coo(torch.tensor([0]), torch.tensor([HUGE - 2]), (1, HUGE - 1)).nnz == 1


# -- derived structure -----------------------------------------------------------------------------


@sweep(nasty=NASTY)
def test_counts_and_indices_agree_with_the_mask(nasty: CsrPattern) -> None:
    mask = mask_of(nasty)
    assert torch.equal(nasty.row_nnz, mask.sum(1).int())
    assert torch.equal(nasty.col_nnz, mask.sum(0).int())
    rows, cols = mask.nonzero(as_tuple=True)
    assert torch.equal(nasty.row_indices, rows.int())
    assert torch.equal(nasty.col_indices, cols.int())
    assert nasty.density == (mask.double().mean().item() if mask.numel() else 0)


@sweep(nasty=NASTY)
def test_row_swizzle_sorts_rows_by_length(nasty: CsrPattern) -> None:
    counts = nasty.row_nnz.tolist()
    expected = sorted(range(nasty.shape[0]), key=lambda row: (-counts[row], row))
    assert nasty.row_swizzle.dtype == torch.int32
    assert nasty.row_swizzle.tolist() == expected


@pytest.mark.parametrize("name", ["T", "row_nnz", "col_nnz", "row_swizzle", "row_indices"])
def test_derived_structure_is_built_once(pattern: CsrPattern, name: str) -> None:
    assert getattr(pattern, name) is getattr(pattern, name)


def test_patterns_are_freed_without_the_collector() -> None:
    """In a reference cycle, index tensors on a GPU would wait for the garbage collector."""
    gc.disable()
    try:
        pattern = uniform_pattern(9, 9, 0.5)
        pattern.T.stats()
        tensors = [weakref.ref(pattern.col_indices), weakref.ref(pattern.T.col_indices)]
        moved = pattern.to("meta")
        gone = [weakref.ref(pattern), weakref.ref(pattern.T), weakref.ref(moved)]
        del pattern, moved
        assert [ref() for ref in gone + tensors] == [None] * 5
    finally:
        gc.enable()


def test_a_transpose_outlives_its_pattern() -> None:
    pattern = uniform_pattern(9, 7, 0.5)
    expected, transpose = copy.copy(pattern), pattern.T
    del pattern
    assert same(transpose.T, expected)
    assert transpose.T is transpose.T
    assert transpose.T.T is transpose
    assert torch.equal(transpose.T.transpose_permutation, expected.transpose_permutation)
    assert torch.equal(transpose.transpose_permutation, expected.T.transpose_permutation)


def brute_force_stats(mask: np.ndarray) -> dict[str, float]:
    m, n = mask.shape
    rows, cols = mask.sum(1), mask.sum(0)
    nnz = int(mask.sum())
    order = np.ix_(np.argsort(-rows, kind="stable"), np.argsort(-cols, kind="stable"))
    tiled = mask[order]
    tiles = [
        int(tiled[i : i + 64, j : j + 64].sum()) for i in range(0, m, 64) for j in range(0, n, 64)
    ]
    heavy = [count for count in tiles if count >= 0.008 * 64 * 64]

    def top_tenth(counts: np.ndarray) -> float:
        return sum(sorted(counts.tolist())[-max(len(counts) // 10, 1) :]) / max(nnz, 1)

    return {
        "nnz": nnz,
        "density": nnz / (m * n) if m * n else 0,
        "empty_rows": float((rows == 0).mean()) if m else 0,
        "empty_cols": float((cols == 0).mean()) if n else 0,
        "max_row_nnz": int(rows.max()) if m else 0,
        "row_cov": float(rows.std() / rows.mean()) if nnz else 0,
        "top_rows": top_tenth(rows) if m else 0,
        "top_cols": top_tenth(cols) if n else 0,
        "heavy_tiles": len(heavy) / len(tiles) if nnz else 0,
        "heavy_nnz": sum(heavy) / nnz if nnz else 0,
    }


@sweep(nasty=NASTY)
def test_stats_agree_with_brute_force(nasty: CsrPattern) -> None:
    expected = brute_force_stats(mask_of(nasty).numpy())
    assert nasty.stats() == pytest.approx(expected, rel=1e-12)
    nasty.stats()["nnz"] = -1
    assert nasty.stats()["nnz"] == nasty.nnz


# -- movement ------------------------------------------------------------------------------------


def derive(pattern: CsrPattern) -> None:
    for name in ("T", "row_nnz", "col_nnz", "row_swizzle", "row_indices"):
        getattr(pattern, name)
    pattern.stats()


def test_to_the_same_device_is_the_same_pattern(pattern: CsrPattern) -> None:
    assert pattern.to("cpu") is pattern


def test_moving_a_pattern_keeps_derived_structure(pattern: CsrPattern) -> None:
    """On "meta" nothing can be computed, so all that is there was moved."""
    derive(pattern)
    moved = pattern.to("meta")
    assert moved.device.type == "meta"
    assert (moved.shape, moved.nnz) == (pattern.shape, pattern.nnz)
    assert moved.stats() == pattern.stats()
    assert moved.has_transpose
    assert moved.T.T is moved
    assert moved.T.shape == pattern.T.shape
    for name in ("row_nnz", "col_nnz", "row_swizzle", "row_indices", "transpose_permutation"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(pattern, name).shape
    assert moved.T.transpose_permutation.shape == (pattern.nnz,)
    assert not uniform_pattern(3, 3, 0.5).to("meta").has_transpose


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@sweep(nasty=NASTY)
def test_to_cuda_and_back(nasty: CsrPattern) -> None:
    derive(nasty)
    there = nasty.to("cuda")
    assert same(there.to("cpu"), nasty)
    assert same(there.T.to("cpu"), nasty.T)
    assert torch.equal(there.row_swizzle.cpu(), nasty.row_swizzle)


def test_a_changed_pattern_cannot_be_moved(pattern: CsrPattern) -> None:
    pattern.col_indices.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        pattern.to("meta")


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p))],
    ids=["deepcopy", "copy", "pickle"],
)
@sweep(nasty=NASTY)
def test_copies_have_equal_structure(
    nasty: CsrPattern, duplicate: Callable[[CsrPattern], CsrPattern]
) -> None:
    derive(nasty)
    other = duplicate(nasty)
    assert other is not nasty
    assert same(other, nasty)
    assert same(other.T, nasty.T)
    other.check_unchanged()


def test_torch_load_validates_patterns(pattern: CsrPattern) -> None:
    """torch.load calls the constructor of a pattern, also with weights_only=True."""
    file = io.BytesIO()
    torch.save({"pattern": pattern}, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True)["pattern"], pattern)
    pattern.col_indices.fill_(10**6)
    file = io.BytesIO()
    torch.save(pattern, file)
    file.seek(0)
    with pytest.raises(ValueError, match=r"col_indices in \[0, 53\)"):
        torch.load(file, weights_only=True)


def test_a_deepcopy_shares_no_memory(pattern: CsrPattern) -> None:
    other = copy.deepcopy(torch.nn.ModuleList([torch.nn.Linear(1, 1)])), copy.deepcopy(pattern)
    other[1].col_indices.zero_()
    pattern.check_unchanged()


def test_unpickling_validates_patterns(pattern: CsrPattern) -> None:
    """The indices are validated again when the pickle is loaded."""
    pattern.col_indices.fill_(10**6)
    with pytest.raises(ValueError, match=r"col_indices in \[0, 53\)"):
        pickle.loads(pickle.dumps(pattern))


# -- inference mode --------------------------------------------------------------------------------


def test_patterns_built_in_inference_mode_can_train() -> None:
    with torch.inference_mode():
        pattern = CsrPattern.from_mask(torch.eye(4))
        given = CsrPattern(
            torch.arange(5, dtype=torch.int32), torch.arange(4, dtype=torch.int32), (4, 4)
        )
        derive(pattern)
        derive(given)
    for p in (pattern, given):
        p.check_unchanged()
        b = torch.ones(4, 2, requires_grad=True)
        rk.spmm(p, torch.ones(p.nnz, requires_grad=True), b).sum().backward()
        assert torch.equal(b.grad, torch.ones(4, 2))
    assert not pattern.row_swizzle.is_inference()


def test_ops_work_in_inference_mode(pattern: CsrPattern) -> None:
    with torch.inference_mode():
        values = torch.ones(pattern.nnz)
        assert rk.spmm(pattern, values, torch.ones(53, 2))[:, 0].sum() == pattern.nnz
        assert rk.csr_transpose(pattern, values)[0] is pattern.T
        w = rk.csr_add_(torch.zeros(37, 53), pattern, values)
        assert torch.equal(rk.csr_gather(w, pattern), values)
